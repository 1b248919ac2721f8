"""The plan: which site gets what, at which cost, by which passes. No weight is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from adaptc.aliases import elsewhere, places
from adaptc.budget import Budget, budget
from adaptc.dataflow import walk
from adaptc.errors import Problem, RefusedError, SpecError
from adaptc.graph import Graph
from adaptc.insert import Insert
from adaptc.kinds import TOKENS, PromptMethod
from adaptc.method import WeightMethod
from adaptc.names import shared_name
from adaptc.near_misses import no_match
from adaptc.orders import check_products, folds_into_bits, lowering, pipeline_of, split
from adaptc.pipeline import Pass, check_order, run
from adaptc.planned import Planned, entries_of, match_checkpoints
from adaptc.planned_quantization import (
    PlannedQuantization,
    expected_error,
    named_twice,
    quantizations_of,
    quantize_notes,
    quantize_problems,
    suggestion,
    weighed_within,
)
from adaptc.quantize import Quantize
from adaptc.quantized import size_of
from adaptc.registry import load_passes
from adaptc.sites import Site
from adaptc.spec import Spec


@dataclass
class Plan:
    """What compiling will do.

    Attributes:
        entries: what is inserted, in order.
        quantized: what is stored in few bits, in order.
        passes: the pipeline as the spec states it.
        closing: of it what folded products have besides: from the pass on that folds.
        budget: parameters, memory and operations.
        notes: what the person should know: patterns without a match, excluded heads, what cannot fold.
        adapted: the graph after the pipeline; its weights are not loaded.
        factored: the same, factored, where the pipeline has not done so itself.
        records: what each pass did.
    """

    entries: list[Planned]
    passes: list[Pass]
    budget: Budget
    notes: list[str]
    adapted: Graph
    factored: Graph
    records: list[Any] = field(default_factory=list)
    quantized: list[PlannedQuantization] = field(default_factory=list)
    closing: list[Pass] = field(default_factory=list)

    @property
    def opening(self) -> list[Pass]:
        """The passes that every product starts with."""
        return self.passes[: len(self.passes) - len(self.closing)]

    @property
    def sites(self) -> list[Site]:
        """Every matched site, entry by entry."""
        return [site for planned in self.entries for site in planned.selection.sites]

    @property
    def pipeline(self) -> list[str]:
        """The passes by name; `factor` follows for the trainable module, `fold` for the folded one."""
        return [item.name for item in self.passes]

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data."""
        return {
            "entries": [_entry_json(planned) for planned in self.entries],
            "quantize": [_quantized_json(planned, self.adapted) for planned in self.quantized],
            "passes": self.pipeline,
            "budget": dataclasses.asdict(self.budget) | {"trainable_share": self.budget.share},
            "notes": self.notes,
        }


def make_plan(spec: Spec, graph: Graph, after: Any = None, weighed: bool = False) -> Plan:
    """Match every entry with the graph, check that each can be inserted, and count.

    With `weighed` weights are read where the spec has a budget, and bits chosen within it.

    Raises:
        SpecError: a target matches nothing, a method cannot sit on a layer, a name is taken, a layer has no
            path to the output, or the passes stand in an impossible order. All problems at once.
        WeightError: an adapter's checkpoint cannot be read.
    """
    entries = [found for index in range(len(spec.adapt)) for found in entries_of(spec, graph, index)]
    problems = [problem for found in entries for problem in _problems(spec, graph, found)]
    problems += _name_clashes(spec, entries)
    quantized = quantizations_of(spec, graph)
    problems += [problem for found in quantized for problem in quantize_problems(spec, graph, found)]
    problems += named_twice(spec, quantized)
    if problems:
        raise SpecError(problems)
    match_checkpoints(spec, graph, entries)
    chosen = []
    if spec.budget is not None:
        if not spec.quantize:
            raise spec.error(("budget",), "chooses the bits of what `quantize` names, and that is nothing")
        if weighed:
            asked, quantized = quantized, weighed_within(spec, graph, quantized, spec.budget)
            chosen.append(suggestion(spec.budget, asked, quantized))
        else:
            chosen.append("budget: bits are chosen when weights are read, by `adaptc compile`")
    passes = pipeline_of(spec, [found.insert for found in entries], [found.item for found in quantized])
    wrong = check_order(passes)
    if wrong:
        raise spec.error(("passes",), wrong, "see `adaptc passes` for the stages each pass takes and leaves")
    opening, closing = split(passes)
    again = [item for item in closing if isinstance(item, Quantize) and item.scheme.calibrated]
    if again and spec.calibration is None and not graph.rows:
        words = (
            f"{again[0].scheme.name} chooses by the layers' inputs, and there are none to quantize again by"
        )
        raise spec.error(("passes",), words, "name some rows: `calibration: rows.jsonl`")
    records: list[Any] = []
    try:
        adapted = run(graph, opening, records, after)
        check_products(spec, adapted, closing)
        factored = run(adapted, lowering(adapted), records, after)
        if closing:
            run(adapted, closing, records, after)
    except RefusedError as error:
        if not isinstance(error.source, Insert | Quantize):
            raise
        key = "adapt" if isinstance(error.source, Insert) else "quantize"
        place = ("base",) if error.source.entry is None else (key, error.source.entry)
        raise spec.error(place, *str(error).splitlines()) from error
    fold = load_passes()["fold"]()
    notes = [*graph.base.notes, *_notes(entries), *_alias_notes(graph, entries)]
    notes += [*chosen, *quantize_notes(graph, quantized)]
    refusals = fold.requires(adapted) if adapted.stage in fold.takes else []
    refusals = refusals or ([folds_into_bits(adapted)] if not closing and folds_into_bits(adapted) else [])
    notes += [f"cannot be folded: {refusal}" for refusal in refusals]
    if any(isinstance(item, Quantize) for item in closing):
        notes += [
            f"emit.{index}: what is trained keeps its weights as they are: `quantize` stands behind `fold`"
            for index, entry in enumerate(spec.emit)
            if entry.format == "torch"
        ]
    stays = adapted.staying
    if stays:
        notes.append(f"{stays} stays when the rest is folded, and is paid for in every product")
    left = run(adapted, [fold]) if stays and adapted.stage in fold.takes and not refusals else None
    counted = budget(graph, adapted, factored, left)
    return Plan(entries, passes, counted, notes, adapted, factored, records, quantized, closing)


def _problems(spec: Spec, graph: Graph, planned: Planned) -> list[Problem]:
    method, selection = planned.insert.method, planned.selection
    key = "adapter" if planned.checkpoint is not None else "target"
    if not selection.sites:
        words = no_match(graph, method, selection, planned.checkpoint is not None)
        return [spec.source.problem(("adapt", planned.entry, key), *words)]
    if selection.lacking:
        words = (f"{method.name}: {selection.lacking[0]}", *selection.lacking[1:])
        return [spec.source.problem(("adapt", planned.entry, key), *words)]
    found: dict[Any, Problem] = {}
    for site in selection.sites:
        refused = planned.insert.refused(site)
        if refused:
            option, reason = refused
            found.setdefault(
                option,
                spec.source.problem(
                    ("adapt", planned.entry, *option), f"{method.name}: {reason}", f"site {site}"
                ),
            )
        elif not reaches_output(graph, site):
            found.setdefault(
                site.module,
                spec.source.problem(
                    ("adapt", planned.entry, key),
                    f"{site.module} is on no path to the output that carries a gradient, so it cannot be trained",
                    f"site {site}",
                    "leave it out with `exclude`",
                ),
            )
    return list(found.values())


def reaches_output(graph: Graph, site: Site) -> bool:
    """Whether a change of this site's weight can reach the output, and a gradient come back."""
    detach = torch.ops.aten.detach.default
    nodes = graph.by_name()

    def without_gradient(node: fx.Node) -> bool:
        value = node.meta.get("val")
        discrete = isinstance(value, torch.Tensor) and not (
            value.dtype.is_floating_point or value.is_complex()
        )
        return node.target is detach or discrete

    reached = walk([nodes[use.node] for use in site.uses], lambda node: node.users, without_gradient)
    return any(node.op == "output" for node in reached)


def _name_clashes(spec: Spec, entries: Sequence[Planned]) -> list[Problem]:
    taken: dict[str, Planned] = {}
    problems = []
    for planned in entries:
        for site in planned.selection.sites:
            method = planned.insert.method
            names = [name for name, _ in planned.insert.tensors(site, planned.selection.sites).values()]
            if isinstance(method, PromptMethod):  # what makes them is dropped when they are saved
                names.append(shared_name(planned.insert.adapter, TOKENS))
            clash = next((n for n in names if taken.get(n, planned) is not planned), None)
            if clash:
                problems.append(
                    spec.source.problem(
                        ("adapt", planned.entry),
                        f"{method.name}: entry {taken[clash].entry} puts an adapter named "
                        f"{planned.insert.adapter!r} on {site.module} already",
                        "give one of them another `name`",
                    )
                )
                break
            taken |= dict.fromkeys(names, planned)
    return problems


def _notes(entries: Sequence[Planned]) -> list[str]:
    notes = []
    for planned in entries:
        where, selection = f"adapt.{planned.entry}", planned.selection
        if planned.checkpoint is None:
            notes += [f"{where}: pattern {pattern!r} matches nothing" for pattern in selection.unused]
        method = planned.insert.method
        if isinstance(method, PromptMethod):
            count = method.num_virtual_tokens
            notes.append(
                f"{where}: tokens count on behind {count} virtual ones: the longest sequence is shorter by these"
            )
        if planned.checkpoint is None and not planned.insert.method.identity_at_init:
            notes.append(
                f"{where}: {planned.insert.method.name} starts elsewhere than the base, before any training"
            )
        if selection.heads:
            notes.append(f"{where}: all-linear leaves out the output head {', '.join(selection.heads)}")
    return notes


def _alias_notes(graph: Graph, entries: Sequence[Planned]) -> list[str]:
    """What becomes of adapted tensors that are used elsewhere too; those that refuse say so when folded."""
    notes = []
    words = {
        "untie": "untied: both are written, each with its own values",
        "share": "shared: the others change with it",
        "live": "kept live: its adapter stays in what is folded, computed when the program is loaded",
    }
    for found in entries:
        for site in found.selection.sites:
            method = found.insert.method
            if found.insert.on_alias not in words or not isinstance(method, WeightMethod):
                continue
            beside = method.adapts_bias() and site.bias
            for name, bias in ((site.name, False), *([(str(site.bias), True)] if beside else [])):
                others = elsewhere(graph, site, bias)
                if others:
                    what = f"adapt.{found.entry}: {name} is also used by {places(others)}"
                    notes.append(f"{what}; it is {words[found.insert.on_alias]}")
    return notes


def _entry_json(planned: Planned) -> dict[str, Any]:
    selection = planned.selection
    return {
        "entry": planned.entry,
        "method": planned.insert.method.name,
        "adapter": planned.insert.adapter,
        "checkpoint": str(planned.checkpoint.path) if planned.checkpoint else None,
        "sites": [site_json(site) for site in selection.sites],
        "excluded": list(selection.excluded),
        "unused_patterns": list(selection.unused) if planned.checkpoint is None else [],
        "near_misses": list(selection.near),
    }


def _quantized_json(planned: PlannedQuantization, adapted: Graph) -> dict[str, Any]:
    expected, more = planned.expected(), planned.outputs(adapted)
    scheme = planned.item.scheme
    return {
        "entry": planned.entry,
        "method": scheme.name,
        "scheme": scheme.text,
        "sites": [
            site_json(site) | {"expected_error": expected_error(scheme, size_of(site)[1])}
            for site in planned.selection.sites
        ],
        "bytes": planned.stored,
        "bits": planned.bits,
        "expected_errors": expected,
        "expected_output_errors": {order: more * error for order, error in expected.items()},
        "excluded": list(planned.selection.excluded),
    }


def site_json(site: Site) -> dict[str, Any]:
    """A site as plain data."""
    return {
        "module": site.module,
        "type": site.type,
        "kind": site.kind,
        "parameter": site.parameter,
        "shape": list(site.shape),
        "dtype": str(site.dtype).removeprefix("torch."),
        "source": site.source,
        "op": site.op,
        "slice": site.piece,
        "rows": [list(rows) for rows in site.rows],
    }
