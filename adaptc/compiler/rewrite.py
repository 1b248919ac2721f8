"""The rewrite: the passes of a plan, run on the traced graph. Values are fake, and no weight is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from adaptc.compiler.plan import Plan
from adaptc.compiler.schedule import folds_into_bits, lowering
from adaptc.errors import Refusal, RefusedError
from adaptc.ir.graph import Graph
from adaptc.rewriter.insert.base import Insert
from adaptc.rewriter.pipeline import PASSES, Compare, PassRecord, run
from adaptc.rewriter.quantize import Quantize
from adaptc.spec.spec import Spec
from adaptc.spec.yaml_text import Loc

After = Callable[[str, Graph], Any]
"""Told of a pass's name and the graph after it."""


@dataclass(frozen=True)
class Rewritten:
    """What a plan's passes make of the traced graph; adapter weights are not loaded.

    Attributes:
        adapted: after the passes that every artifact starts with.
        factored: the same as it is trained and run live.
        folded: what stays when it is folded; None where that is the base, or it cannot be folded.
        refusals: why it cannot be folded; empty if it can.
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
        after: told of each pass.
        compare: measures what a pass of a user's own changes; None where weights are not to be read.

    Raises:
        SpecError: a pass that an entry asks for refuses the graph.
        RefusedError: another pass of the spec does.
    """
    records: list[PassRecord] = []
    try:
        adapted = run(graph, plan.opening, records, after, compare)
        factored = run(adapted, lowering(adapted), records, after)
        if plan.closing:  # it is run again with the adapters as trained; here it shows that it can be
            run(adapted, plan.closing, records, after, compare)
    except RefusedError as error:
        if not isinstance(error.source, Insert | Quantize):
            raise
        raise spec.error(_place_of(error.source), error.message, *error.notes) from error
    refusals = _fold_refusals(adapted, plan)
    fold = PASSES["fold"]()
    stays = adapted.staying and adapted.stage in fold.takes and not refusals
    return Rewritten(adapted, factored, run(adapted, [fold]) if stays else None, refusals, records)


def _fold_refusals(adapted: Graph, plan: Plan) -> list[Refusal]:
    fold = PASSES["fold"]()
    refusals = fold.requires(adapted) if adapted.stage in fold.takes else []
    into_bits = None if plan.closing else folds_into_bits(adapted)
    return refusals or ([into_bits] if into_bits else [])


def _place_of(item: Insert | Quantize) -> Loc:
    """Where a spec asks for a pass: an entry; of what quantizes the base's own bits the base."""
    key = "adapt" if isinstance(item, Insert) else "quantize"
    return ("base",) if item.entry is None else (key, item.entry)
