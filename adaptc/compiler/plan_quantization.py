"""From the entries of `quantize` to what is stored in few bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from adaptc.errors import InputError, Problem
from adaptc.ir.aliases import module_names, used_elsewhere
from adaptc.ir.graph import Graph
from adaptc.ir.selection import Selection, no_match
from adaptc.methods.site import WeightSite
from adaptc.quantization.quantized_weight import bytes_of, matrix_size
from adaptc.quantization.scheme import Scheme
from adaptc.rewriter.quantize import Quantize
from adaptc.spec.spec import QuantizeBudget, Spec

SAMPLE = 2**16
"""Numbers that the expected error is found with."""


@dataclass(frozen=True)
class PlannedQuantization:
    """Weights to store in few bits: an entry of `quantize`, or None for those that the base has in bits already."""

    entry: int | None
    item: Quantize
    selection: Selection[WeightSite]

    @property
    def stored(self) -> int:
        """Bytes of all its matrices."""
        return sum(bytes_of(self.item.scheme, *matrix_size(site)) for site in self.selection.sites)

    @property
    def bits(self) -> float:
        """Bits a weight, scales and all."""
        return 8 * self.stored / max(1, self.numbers)

    @property
    def numbers(self) -> int:
        """How many weights."""
        return sum(math.prod(matrix_size(site)) for site in self.selection.sites)

    def expected(self) -> dict[str, float]:
        """Relative error of each order of fold and quantize: of the weights, were they normally distributed.

        A layer's output is off by about as much. The model's outputs are by at most about `outputs` times as much.
        """
        sizes = [matrix_size(site) for site in self.selection.sites]
        errors = [expected_error(self.item.scheme, columns) for _, columns in sizes]
        squares = sum(error**2 * rows * columns for error, (rows, columns) in zip(errors, sizes, strict=True))
        once = (squares / max(1, self.numbers)) ** 0.5
        if self.entry is None:
            return {"insert": 0.0, "insert, fold, quantize": once}
        return {
            "insert, fold, quantize": once,
            "quantize, insert": once,
            "quantize, insert, fold": once,
            "quantize, insert, fold, quantize": once * 2**0.5,
        }

    def outputs(self, graph: Graph) -> float:
        """How many layers' errors add up in the model's outputs: the root of the products in a row.

        Independent errors add up by their squares; behind a residual stream or a norm less of each is left.
        """
        mine = {use.node for site in self.selection.sites for use in site.uses}
        behind: dict[Any, int] = {}
        for node in graph.nodes:
            before = max((behind[operand] for operand in node.all_input_nodes), default=0)
            behind[node] = before + (node.name in mine)
        return max(behind.values(), default=0) ** 0.5


@cache
def expected_error(scheme: Scheme, columns: int) -> float:
    """‖Ŵ - W‖ / ‖W‖ of some rows of normally distributed weights."""
    rows = max(SAMPLE // columns, 1)
    W = torch.randn((rows, columns), generator=torch.Generator().manual_seed(0))
    plain = scheme.without_inputs()
    held = {**plain.constants(), **plain.quantize(W)}
    return float((plain.dequantize(rows, columns, held) - W).norm() / W.norm())


def quantizations_of(spec: Spec, graph: Graph) -> list[PlannedQuantization]:
    """What the base has in bits, and what the entries of `quantize` store in few; what these name is theirs."""
    found: list[PlannedQuantization] = []
    for index, entry in enumerate(spec.quantize):
        item = Quantize(entry.build(), target=entry.target, exclude=entry.exclude, entry=index)
        found.append(PlannedQuantization(index, item, item.selection(graph)))
    taken = {site.parameter for planned in found for site in planned.selection.sites}
    return [*_of_base(graph, taken), *found]


def _of_base(graph: Graph, taken: set[str]) -> list[PlannedQuantization]:
    of: dict[Scheme, list[str]] = {}
    for site in graph.sites:
        known = graph.source.packed.get(site.parameter)
        if known is not None and site.parameter not in taken:
            of.setdefault(known.matrix.scheme, []).append(site.pattern)
    found = []
    for scheme, target in of.items():
        item = Quantize(scheme, target=tuple(target), entry=None)
        found.append(PlannedQuantization(None, item, item.selection(graph)))
    return found


def quantize_problems(spec: Spec, graph: Graph, planned: PlannedQuantization) -> list[Problem]:
    """Why an entry cannot be done: its target matches nothing, or matrices that the scheme does not take."""
    if planned.entry is None:
        return []
    item, place = planned.item, ("quantize", planned.entry)
    scheme = item.scheme
    if not planned.selection.sites:
        return [spec.source.problem((*place, "target"), *no_match(graph, scheme, planned.selection, False))]
    if scheme.calibrated and spec.calibration is None and not graph.calibration_rows:
        words = f"{scheme.name} chooses by the layers' inputs, and there are none"
        return [spec.source.problem(place, words, "name some rows: `calibration: rows.jsonl`")]
    found: dict[Any, Problem] = {}
    for site in planned.selection.sites:
        refused = item.refused(graph, site)
        if refused:
            words = f"{scheme.name}: {refused.reason}"
            found.setdefault(
                refused.option, spec.source.problem((*place, *refused.option), words, f"site {site}")
            )
    return list(found.values())


def named_twice(spec: Spec, planned: Sequence[PlannedQuantization]) -> list[Problem]:
    """Weights that two entries store."""
    taken: dict[str, int] = {}
    problems = []
    for found in planned:
        if found.entry is None:
            continue
        twice = next((s for s in found.selection.sites if s.parameter in taken), None)
        if twice is not None:
            words = (
                f"{found.item.scheme.name}: quantize.{taken[twice.parameter]} stores {twice.module} already"
            )
            place = ("quantize", found.entry, "target")
            problems.append(spec.source.problem(place, words, "leave it out of one of them with `exclude`"))
        taken |= {site.parameter: found.entry for site in found.selection.sites}
    return problems


def quantize_notes(graph: Graph, planned: Sequence[PlannedQuantization]) -> list[str]:
    """What the person should know: patterns without a match, heads left out, tensors that are used elsewhere too."""
    notes = []
    for found in planned:
        if found.entry is None:
            continue
        where = f"quantize.{found.entry}"
        again = sum(site.parameter in graph.source.packed for site in found.selection.sites)
        if again:
            notes.append(
                f"{where}: {again} weights of the base are quantized anew, from what its bits stand for"
            )
        notes += [f"{where}: pattern {pattern!r} matches nothing" for pattern in found.selection.unused]
        if found.selection.heads:
            notes.append(f"{where}: all-linear leaves out the output head {', '.join(found.selection.heads)}")
        for site in found.selection.sites:
            others = used_elsewhere(graph, site)
            if others:
                notes.append(
                    f"{where}: {site.name} is also used by {module_names(others)}, which read the same bits"
                )
    return notes


def within_budget(
    spec: Spec, graph: Graph, planned: list[PlannedQuantization], weighed: bool
) -> tuple[list[PlannedQuantization], str]:
    """The entries with bits chosen for each layer within the spec's budget, and the choice in words.

    Where there is no budget the entries as they are, and "". Without `weighed` no weight is read, and nothing chosen.

    Raises:
        SpecError: the budget is too small, or nothing is quantized.
    """
    if spec.budget is None:
        return planned, ""
    if not spec.quantize:
        raise spec.error(("budget",), "chooses the bits of what `quantize` names, and that is nothing")
    if not weighed:
        return planned, "budget: bits are chosen when weights are read, by `adaptc compile`"
    chosen = _weighed_within(spec, graph, planned, spec.budget)
    return chosen, _suggestion(spec.budget, planned, chosen)


def _weighed_within(
    spec: Spec, graph: Graph, planned: Sequence[PlannedQuantization], budget: QuantizeBudget
) -> list[PlannedQuantization]:
    """The entries with bits chosen for each layer, within the spec's budget; what the base has in bits stays.

    Raises:
        SpecError: it is too small.
    """
    from adaptc.compiler.mixed_precision import choose

    try:
        items = choose(graph, [found.item for found in planned if found.entry is not None], budget)
    except InputError as error:
        raise spec.error(("budget",), str(error)) from error
    chosen = [PlannedQuantization(item.entry, item, item.selection(graph)) for item in items]
    return [*(found for found in planned if found.entry is None), *chosen]


def _suggestion(
    budget: QuantizeBudget, before: Sequence[PlannedQuantization], after: Sequence[PlannedQuantization]
) -> str:
    """What a budget has chosen, in words: how many weights get which scheme, and which are left out."""
    counts = {
        found.item.scheme.text: len(found.selection.sites) for found in after if found.entry is not None
    }
    kept = {site.parameter for found in after for site in found.selection.sites}
    left = [s.module for found in before for s in found.selection.sites if s.parameter not in kept]
    words = [f"{text} for {count} weights" for text, count in counts.items()]
    if left:
        words.append(f"floats (`exclude`) for {', '.join(left)}")
    given = ", ".join(f"{key} {value}" for key, value in budget.model_dump().items() if value is not None)
    return f"budget, {given}: {'; '.join(words)}"
