"""The plan: which site gets which adapter or scheme, and by which passes. Nothing is rewritten."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from adaptc.checkpoints.adapter import Checkpoint
from adaptc.checkpoints.asked_for import asked_for
from adaptc.compiler.plan.adapter_weights import load_checkpoints
from adaptc.compiler.plan.adapters import PlannedInsertion, entries_of, match_checkpoints
from adaptc.compiler.plan.combined import combined_entry
from adaptc.compiler.plan.continued import with_starts
from adaptc.compiler.plan.quantization import (
    PlannedQuantization,
    named_twice,
    quantizations_of,
    quantize_problems,
    within_budget,
)
from adaptc.compiler.plan.replaced import without_replaced
from adaptc.compiler.plan.schedule import as_written, closing_of, pipeline_of
from adaptc.errors import Problem, SpecError
from adaptc.ir.analysis.dataflow import readers, walk
from adaptc.ir.graph import Graph
from adaptc.ir.selection import no_match
from adaptc.methods.method import shared_name
from adaptc.methods.point_sites import Site
from adaptc.methods.virtual_tokens import PROMPT_KEY, PromptMethod
from adaptc.rewriter.pipeline import Pass, run
from adaptc.spec.entries import CombineEntry
from adaptc.spec.spec import Spec


@dataclass
class Plan:
    """What is inserted and quantized at which sites, and by which passes.

    Attributes:
        entries: what is inserted, in order.
        quantized: what is stored in few bits, in order.
        passes: the pipeline, in order.
        closing: the end of the pipeline that only folded artifacts have: the pass that folds, and all after it.
        choice: the bits that were chosen within the spec's budget, in words; "" where there is no budget.
    """

    entries: list[PlannedInsertion]
    quantized: list[PlannedQuantization]
    passes: list[Pass]
    closing: list[Pass]
    choice: str = ""

    @property
    def opening(self) -> list[Pass]:
        """The passes that every artifact starts with."""
        return self.passes[: len(self.passes) - len(self.closing)]

    @property
    def sites(self) -> list[Site]:
        """Every matched site, entry by entry."""
        return [site for planned in self.entries for site in planned.selection.sites]

    @property
    def pipeline(self) -> list[str]:
        """The passes by name; `factor` follows for the trainable module, `fold` for the folded one."""
        return [item.name for item in self.passes]

    @property
    def stated(self) -> list[str | dict[str, Any]]:
        """The pipeline as a spec's `passes` would state it."""
        inserts = [planned.insert for planned in self.entries]
        return as_written(self.passes, inserts, [planned.item for planned in self.quantized])


def make_plan(spec: Spec, graph: Graph, weighed: bool = False) -> Plan:
    """Match every entry with the graph, check that each can be done, and put the passes in order.

    Args:
        spec: the spec.
        graph: the traced graph.
        weighed: read weights to choose bits, where the spec has a budget; without it no weight is read.

    Raises:
        SpecError: a target matches nothing, a method cannot adapt a layer, a name is taken, a layer has no
            path to the output, or the order of the passes is impossible. All problems at once.
        WeightError: an adapter's checkpoint cannot be read.
    """
    entries = [planned for index in range(len(spec.adapt)) for planned in _planned(spec, graph, index)]
    entries = with_starts(spec, graph, without_replaced(graph, entries))
    quantized = quantizations_of(spec, graph)
    problems = insertion_problems(spec, graph, entries)
    problems += [problem for planned in quantized for problem in quantize_problems(spec, graph, planned)]
    problems += named_twice(spec, quantized)
    if problems:
        raise SpecError(problems)
    match_checkpoints(spec, graph, entries)
    quantized, choice = within_budget(spec, graph, quantized, weighed)
    passes = pipeline_of(
        spec, [planned.insert for planned in entries], [planned.item for planned in quantized]
    )
    return Plan(entries, quantized, passes, closing_of(spec, graph, passes), choice)


def plan_alternative(spec: Spec, graph: Graph, base: Plan) -> Plan:
    """The plan of one of `adapters`: its entries on top of a plan without it, whose passes come first.

    Args:
        spec: `Spec.alternative` of it.
        graph: the traced graph.
        base: the plan of `adapt` and `quantize`.

    Raises:
        SpecError: as `make_plan`.
        WeightError: an adapter's checkpoint cannot be read.
    """
    first = sum(spec.place(index)[0] == "adapt" for index in range(len(spec.adapt)))
    added = [p for index in range(first, len(spec.adapt)) for p in _planned(spec, graph, index)]
    added = with_starts(spec, graph, without_replaced(graph, added))
    entries = [*base.entries, *added]
    problems = insertion_problems(spec, graph, entries)
    if problems:
        raise SpecError(problems)
    match_checkpoints(spec, graph, added)
    inserts = [planned.insert for planned in added]
    passes = [*base.opening, *inserts, *base.closing]
    return Plan(entries, base.quantized, passes, base.closing, base.choice)


def _planned(spec: Spec, graph: Graph, index: int) -> list[PlannedInsertion]:
    """The methods that one entry inserts.

    Raises:
        SpecError: it cannot be done.
        WeightError: a checkpoint cannot be read.
    """
    entry = spec.adapt[index]
    if not isinstance(entry, CombineEntry):
        return entries_of(spec, graph, index)

    def adapted(alone: Spec) -> tuple[Graph, list[Checkpoint]]:
        plan = make_plan(alone, graph)
        inserted = run(graph, plan.opening)
        load_checkpoints(alone, plan.entries, graph, inserted)
        read = {planned.checkpoint.path: planned.checkpoint for planned in plan.entries if planned.checkpoint}
        return inserted, list(read.values())

    return combined_entry(spec, graph, index, entry, adapted)


def insertion_problems(spec: Spec, graph: Graph, entries: Sequence[PlannedInsertion]) -> list[Problem]:
    """Why entries cannot be done, each and together."""
    problems = [problem for planned in entries for problem in _problems(spec, graph, planned)]
    return problems + _name_clashes(spec, entries)


def _problems(spec: Spec, graph: Graph, planned: PlannedInsertion) -> list[Problem]:
    """Why an entry cannot be done: its target matches nothing, or sites that the method cannot adapt."""
    method, selection = planned.insert.method, planned.selection
    key = "adapter" if planned.checkpoint is not None else "target"
    if not selection.sites:
        lines = no_match(graph, method, selection)
        asked = asked_for(planned.checkpoint) if planned.checkpoint is not None else []
        return [spec.source.problem((*spec.place(planned.entry), key), *lines, *asked)]
    if selection.lacking:
        message, notes = selection.lacking[0], selection.lacking[1:]
        return [spec.source.problem((*spec.place(planned.entry), key), f"{method.name}: {message}", *notes)]
    problems: dict[Any, Problem] = {}  # one for each option at fault, and for each module on no path
    for site in selection.sites:
        refused = planned.insert.refused(site)
        if refused:
            problems.setdefault(
                refused.option,
                spec.source.problem(
                    (*spec.place(planned.entry), *refused.option),
                    f"{method.name}: {refused.reason}",
                    f"site {site}",
                    *refused.advice,
                ),
            )
        elif not reaches_output(graph, site):
            problems.setdefault(
                site.module,
                spec.source.problem(
                    (*spec.place(planned.entry), key),
                    f"{site.module} is on no path to the output that carries a gradient, so it cannot be trained",
                    f"site {site}",
                    "leave it out with `exclude`",
                ),
            )
    return list(problems.values())


def reaches_output(graph: Graph, site: Site) -> bool:
    """Whether the site has a path to the output along which gradients flow back."""
    detach = torch.ops.aten.detach.default
    nodes = graph.by_name()

    def without_gradient(node: fx.Node) -> bool:
        value = node.meta.get("val")
        discrete = isinstance(value, torch.Tensor) and not (
            value.dtype.is_floating_point or value.is_complex()
        )
        return node.target is detach or discrete

    reached = walk([nodes[use.node] for use in site.uses], readers, without_gradient)
    return any(node.op == "output" for node in reached)


def _name_clashes(spec: Spec, entries: Sequence[PlannedInsertion]) -> list[Problem]:
    """Why a site cannot hold all its adapters: two entries give it tensors of the same name."""
    taken: dict[str, PlannedInsertion] = {}
    problems: list[Problem] = []
    for planned in entries:
        for site in planned.selection.sites:
            method = planned.insert.method
            names = [name for name, _ in planned.insert.tensors(site, planned.selection.sites).values()]
            if isinstance(method, PromptMethod):  # a checkpoint holds the tokens alone, under this name
                names.append(shared_name(planned.insert.adapter, PROMPT_KEY))
            clash = next((n for n in names if taken.get(n, planned) is not planned), None)
            if clash:
                problems.append(
                    spec.source.problem(
                        spec.place(planned.entry),
                        f"{method.name}: {spec.shown_place(taken[clash].entry)} puts an adapter named "
                        f"{planned.insert.adapter!r} on {site.module} already",
                        "give one of them another `name`",
                    )
                )
                break
            taken |= dict.fromkeys(names, planned)
    return problems
