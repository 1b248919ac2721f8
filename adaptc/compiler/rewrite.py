"""The rewrite: the passes of a plan, run on the traced graph. Values are fake, and no weight is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from adaptc.compiler.plan.plan import Plan
from adaptc.compiler.plan.schedule import folds_into_bits, lowering
from adaptc.errors import Refusal, RefusedError
from adaptc.ir.graph import Graph
from adaptc.rewriter.insert.base import Insert
from adaptc.rewriter.pipeline import PASSES, Compare, Pass, PassRecord, run
from adaptc.rewriter.quantize import Quantize
from adaptc.spec.spec import Spec
from adaptc.spec.yaml_text import Loc

After = Callable[[str, Graph], Any]
"""Called with a pass's name and the graph after it."""


@dataclass(frozen=True)
class Rewritten:
    """The graphs that a plan's passes make of the traced graph; adapter weights are not loaded.

    Attributes:
        adapted: the graph after the passes that every artifact starts with.
        factored: the adapted graph as it is trained and run live.
        folded: the folded graph, where adapters stay in it; None where it is the base, or cannot be folded.
        refusals: why the adapted graph cannot be folded; empty if it can.
        records: what each pass did.
    """

    adapted: Graph
    factored: Graph
    folded: Graph | None
    refusals: list[Refusal]
    records: list[PassRecord]


def rewrite(
    spec: Spec, graph: Graph, plan: Plan, after: After | None = None, compare: Compare | None = None
) -> Rewritten:
    """Run a plan's passes; the traced graph is left as it is.

    Args:
        spec: the spec.
        graph: the traced graph.
        plan: what goes where.
        after: called after each pass.
        compare: measures whether a user's pass changes results; None where weights are not to be read.

    Raises:
        SpecError: a pass that an entry asks for refuses the graph.
        RefusedError: another pass of the spec refuses it.
    """
    records: list[PassRecord] = []
    try:
        adapted = run(graph, plan.opening, records, after, compare)
        factored = run(adapted, lowering(adapted), records, after)
        if plan.closing:  # checks that it can run; artifacts run it again with the adapters as trained
            run(adapted, plan.closing, records, after, compare)
    except RefusedError as error:
        place = _place_of(spec, error.source)
        if place is None:
            raise
        raise spec.error(place, error.message, *error.notes) from error
    refusals = _fold_refusals(adapted, plan)
    fold = PASSES["fold"]()
    stays = adapted.staying and adapted.stage in fold.takes and not refusals
    return Rewritten(adapted, factored, run(adapted, [fold]) if stays else None, refusals, records)


def rewrite_alternative(spec: Spec, base: Graph, plan: Plan, added: Sequence[Pass]) -> Rewritten:
    """Run the passes that an alternative adds to the adapted graph without it.

    Args:
        spec: `Spec.alternative` of it.
        base: the adapted graph without it.
        plan: its plan.
        added: the passes.

    Raises:
        SpecError: a pass refuses the graph.
    """
    records: list[PassRecord] = []
    try:
        adapted = run(base, added, records)
        factored = run(adapted, lowering(adapted), records)
    except RefusedError as error:
        place = _place_of(spec, error.source)
        if place is None:
            raise
        raise spec.error(place, error.message, *error.notes) from error
    return Rewritten(adapted, factored, None, _fold_refusals(adapted, plan), records)


def _fold_refusals(adapted: Graph, plan: Plan) -> list[Refusal]:
    """Why the adapted graph cannot be folded; empty if it can."""
    fold = PASSES["fold"]()
    refusals = fold.requires(adapted) if adapted.stage in fold.takes else []
    into_bits = None if plan.closing else folds_into_bits(adapted)
    return refusals or ([into_bits] if into_bits else [])


def _place_of(spec: Spec, source: object) -> Loc | None:
    """The place of a spec that asks for a pass: its entry, or `base` for what the base stores in few bits."""
    if isinstance(source, Insert):
        return spec.place(source.entry)
    if isinstance(source, Quantize):
        return ("base",) if source.entry is None else ("quantize", source.entry)
    return None
