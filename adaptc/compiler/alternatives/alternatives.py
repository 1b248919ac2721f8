"""The alternatives of a spec, its `adapters`: each planned and rewritten on top of what is always on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from adaptc.compiler.plan.plan import Plan, plan_alternative
from adaptc.compiler.plan.report import PlanReport, plan_report
from adaptc.compiler.rewrite import Rewritten, rewrite_alternative
from adaptc.errors import Problem, SpecError
from adaptc.ir.graph import Graph
from adaptc.spec.spec import Spec

Adapted = Mapping[str, tuple[Spec, Graph]]
"""Name of an alternative -> its spec, `Spec.alternative`, and the graph with it."""


@dataclass(frozen=True)
class Alternative:
    """One of `adapters`: the model with it beside what is always on.

    Attributes:
        spec: `Spec.alternative` of it.
        plan: the plan with what is always on, and its entries behind.
        rewritten: the graphs that the plan makes.
    """

    spec: Spec
    plan: PlanReport
    rewritten: Rewritten


def make_alternatives(spec: Spec, graph: Graph, plan: Plan, base: Rewritten) -> dict[str, Alternative]:
    """Plan and rewrite every alternative.

    Args:
        spec: the spec.
        graph: the traced graph.
        plan: the plan of what is always on.
        base: the graphs that it makes.

    Returns:
        Name -> alternative, in the order of the spec.

    Raises:
        SpecError: an alternative cannot be done; holds the problems of all.
        WeightError: an adapter's checkpoint cannot be read.
    """
    alternatives: dict[str, Alternative] = {}
    problems: list[Problem] = []
    for name in spec.adapters:
        try:
            alternatives[name] = _alternative(spec.alternative(name), graph, plan, base.adapted)
        except SpecError as error:
            problems += error.problems
    adapted = {name: (other.spec, other.rewritten.adapted) for name, other in alternatives.items()}
    problems += _same_names(base.adapted, adapted)
    if problems:
        raise SpecError(problems)
    return alternatives


def one_more(spec: Spec, name: str, graph: Graph, plan: Plan, base: Graph, others: Adapted) -> Alternative:
    """Plan and rewrite one alternative beside others.

    Args:
        spec: the spec, with it.
        name: its name.
        graph: the traced graph.
        plan: the plan of what is always on.
        base: the adapted graph that it makes.
        others: those that are there.

    Raises:
        SpecError: it cannot be done.
        WeightError: its checkpoint cannot be read.
    """
    made = _alternative(spec.alternative(name), graph, plan, base)
    problems = _same_names(base, {**others, name: (made.spec, made.rewritten.adapted)})
    if problems:
        raise SpecError(problems)
    return made


def _same_names(base: Graph, alternatives: Adapted) -> list[Problem]:
    """Why alternatives cannot be in one module: two give a site tensors of the same name."""
    taken: dict[str, str] = {}
    problems: list[Problem] = []
    for name, (spec, adapted) in alternatives.items():
        added = adapted.adaptations[len(base.adaptations) :]
        for adaptation in added:
            clash = next((t for t, _ in adaptation.params.values() if taken.get(t, name) != name), None)
            if clash is not None:
                where = adaptation.site.module
                message = f"{taken[clash]!r} has an adapter named {adaptation.adapter!r} on {where} too"
                place = spec.place(adaptation.entry)
                problems.append(spec.source.problem(place, message, "give one of them another `name`"))
                break
            taken |= {t: name for t, _ in adaptation.params.values()}
    return problems


def _alternative(spec: Spec, graph: Graph, base_plan: Plan, base: Graph) -> Alternative:
    """One alternative.

    Args:
        spec: `Spec.alternative` of it.
        graph: the traced graph.
        base_plan: the plan of what is always on.
        base: the adapted graph that it makes.
    """
    plan = plan_alternative(spec, graph, base_plan)
    added = [planned.insert for planned in plan.entries[len(base_plan.entries) :]]
    rewritten = rewrite_alternative(spec, base, plan, added)
    return Alternative(spec, plan_report(spec, graph, plan, rewritten), rewritten)
