"""The quantization of a plan: from the entries of `quantize`, and the base's own bits, to schemes on sites."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import fx

from adaptc.compiler.plan.mixed_precision import choose
from adaptc.compiler.proof.quantization_error import relative
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
"""How many random weights the expected error of a scheme is measured on."""


@dataclass(frozen=True)
class PlannedQuantization:
    """Weights to store in few bits.

    Attributes:
        entry: the number of the entry of `quantize`; None for weights that the base stores in few bits already.
        item: the pass that quantizes them.
        selection: the sites that its target matches.
    """

    entry: int | None
    item: Quantize
    selection: Selection[WeightSite]

    @property
    def stored(self) -> int:
        """The bytes of all its matrices as stored, scales included."""
        return sum(bytes_of(self.item.scheme, *matrix_size(site)) for site in self.selection.sites)

    @property
    def bits(self) -> float:
        """Bits for each weight, scales included."""
        return 8 * self.stored / max(1, self.numbers)

    @property
    def numbers(self) -> int:
        """How many numbers its matrices have."""
        return sum(math.prod(matrix_size(site)) for site in self.selection.sites)

    def expected(self) -> dict[str, float]:
        """The relative error ‖Ŵ - W‖ / ‖W‖ to expect of the weights, were they normally distributed.

        A layer's output has about the same error. The model's outputs have at most about `growth` times as much.

        Returns:
            Each order of insert, fold and quantize -> its error.
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

    def growth(self, graph: Graph) -> float:
        """By how much the error of one layer grows in the model's outputs, at most: √n for n quantized layers in a row.

        Independent errors add up by their squares. A residual stream or a norm makes each smaller downstream.
        """
        quantized = {use.node for site in self.selection.sites for use in site.uses}
        upstream: dict[fx.Node, int] = {}
        for node in graph.nodes:
            most = max((upstream[operand] for operand in node.all_input_nodes), default=0)
            upstream[node] = most + (node.name in quantized)
        return max(upstream.values(), default=0) ** 0.5


@cache
def expected_error(scheme: Scheme, columns: int) -> float:
    """‖Ŵ - W‖ / ‖W‖ of normally distributed weights: of about `SAMPLE`, in rows of so many columns."""
    rows = max(SAMPLE // columns, 1)
    W = torch.randn((rows, columns), generator=torch.Generator().manual_seed(0))
    plain = scheme.without_inputs()
    tensors = {**plain.constants(), **plain.quantize(W)}
    return relative(plain.dequantize(rows, columns, tensors), W)


def quantizations_of(spec: Spec, graph: Graph) -> list[PlannedQuantization]:
    """The weights that the base stores in few bits, then those of the entries of `quantize`.

    A weight of the base that an entry names too belongs to the entry.
    """
    planned: list[PlannedQuantization] = []
    for index, entry in enumerate(spec.quantize):
        item = Quantize(entry.build(), target=entry.target, exclude=entry.exclude, entry=index)
        planned.append(PlannedQuantization(index, item, item.selection(graph)))
    taken = {site.parameter for entry in planned for site in entry.selection.sites}
    return [*_of_base(graph, taken), *planned]


def _of_base(graph: Graph, taken: set[str]) -> list[PlannedQuantization]:
    """The weights that the base stores in few bits and that are not `taken`, by their scheme."""
    targets: dict[Scheme, list[str]] = {}
    for site in graph.sites:
        packed = graph.source.packed.get(site.parameter)
        if packed is not None and site.parameter not in taken:
            targets.setdefault(packed.matrix.scheme, []).append(site.pattern)
    items = [Quantize(scheme, target=tuple(target), entry=None) for scheme, target in targets.items()]
    return [PlannedQuantization(None, item, item.selection(graph)) for item in items]


def quantize_problems(spec: Spec, graph: Graph, planned: PlannedQuantization) -> list[Problem]:
    """Why an entry cannot be done: its target matches nothing, or matrices that the scheme cannot store."""
    if planned.entry is None:
        return []
    item, place = planned.item, ("quantize", planned.entry)
    scheme = item.scheme
    if not planned.selection.sites:
        return [spec.source.problem((*place, "target"), *no_match(graph, scheme, planned.selection))]
    if scheme.calibrated and spec.calibration is None and not graph.calibration_rows:
        message = f"{scheme.name} chooses by the layers' inputs, and there are none"
        return [spec.source.problem(place, message, "name some rows: `calibration: rows.jsonl`")]
    problems: dict[tuple[str, ...], Problem] = {}
    for site in planned.selection.sites:
        refused = item.refused(graph, site)
        if refused:
            message = f"{scheme.name}: {refused.reason}"
            problem = spec.source.problem((*place, *refused.option), message, f"site {site}")
            problems.setdefault(refused.option, problem)
    return list(problems.values())


def named_twice(spec: Spec, planned: Sequence[PlannedQuantization]) -> list[Problem]:
    """Why the entries cannot be done together: two of them quantize one weight."""
    first: dict[str, int] = {}
    problems: list[Problem] = []
    for entry in planned:
        if entry.entry is None:
            continue
        twice = next((s for s in entry.selection.sites if s.parameter in first), None)
        if twice is not None:
            other = f"quantize.{first[twice.parameter]}"
            message = f"{entry.item.scheme.name}: {other} quantizes {twice.module} already"
            place = ("quantize", entry.entry, "target")
            problems.append(spec.source.problem(place, message, "leave it out of one of them with `exclude`"))
        first |= {site.parameter: entry.entry for site in entry.selection.sites}
    return problems


def quantize_notes(graph: Graph, planned: Sequence[PlannedQuantization]) -> list[str]:
    """A note on each pattern without a match, head left out, and tensor that is used elsewhere too."""
    notes: list[str] = []
    for entry in planned:
        if entry.entry is None:
            continue
        place, selection = f"quantize.{entry.entry}", entry.selection
        again = sum(site.parameter in graph.source.packed for site in selection.sites)
        if again:
            notes.append(f"{place}: {again} weights of the base are dequantized and quantized again")
        notes += [f"{place}: pattern {pattern!r} matches nothing" for pattern in selection.unused]
        if selection.heads:
            notes.append(f"{place}: all-linear leaves out the output head {', '.join(selection.heads)}")
        notes += [f"{place}: left out: {message}" for message in selection.computed]
        for site in selection.sites:
            others = used_elsewhere(graph, site)
            if others:
                users = module_names(others)
                notes.append(f"{place}: {site.name} is also used by {users}, which read the same bits")
    return notes


def within_budget(
    spec: Spec, graph: Graph, planned: list[PlannedQuantization], weighed: bool
) -> tuple[list[PlannedQuantization], str]:
    """Choose the bits of each layer within the spec's budget, if it has one.

    Args:
        spec: the spec.
        graph: the traced graph.
        planned: the entries before the choice.
        weighed: read weights and choose; without it the entries stay as they are.

    Returns:
        The entries after the choice, and the choice in words ("" where there is no budget).

    Raises:
        SpecError: the budget is too small, or nothing is quantized.
    """
    if spec.budget is None:
        return planned, ""
    if not spec.quantize:
        raise spec.error(
            ("budget",), "chooses the bits of the layers that `quantize` names, and there is no `quantize`"
        )
    if not weighed:
        return planned, "budget: `adaptc compile` chooses the bits, since that needs the weights"
    chosen = _weighed_within(spec, graph, planned, spec.budget)
    return chosen, _choice(spec.budget, planned, chosen)


def _weighed_within(
    spec: Spec, graph: Graph, planned: Sequence[PlannedQuantization], budget: QuantizeBudget
) -> list[PlannedQuantization]:
    """The entries with bits chosen for each layer; weights that the base stores in few bits keep theirs.

    Raises:
        SpecError: the budget is too small.
    """
    of_base = [entry for entry in planned if entry.entry is None]
    try:
        items = choose(graph, [entry.item for entry in planned if entry.entry is not None], budget)
    except InputError as error:
        raise spec.error(("budget",), error.message, *error.notes) from error
    return [*of_base, *(PlannedQuantization(item.entry, item, item.selection(graph)) for item in items)]


def _choice(
    budget: QuantizeBudget, before: Sequence[PlannedQuantization], after: Sequence[PlannedQuantization]
) -> str:
    """The choice within a budget in words: how many weights get which scheme, and which stay floats."""
    counts = {
        entry.item.scheme.text: len(entry.selection.sites) for entry in after if entry.entry is not None
    }
    quantized = {site.parameter for entry in after for site in entry.selection.sites}
    floats = [s.module for entry in before for s in entry.selection.sites if s.parameter not in quantized]
    parts = [f"{text} for {count} weights" for text, count in counts.items()]
    if floats:
        parts.append(f"floats (`exclude`) for {', '.join(floats)}")
    limit = ", ".join(f"{key} {value}" for key, value in budget.model_dump().items() if value is not None)
    return f"budget, {limit}: {'; '.join(parts)}"
