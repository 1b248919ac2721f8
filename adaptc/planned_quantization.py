"""From the entries of `quantize` to what is stored in few bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from adaptc.aliases import elsewhere, places
from adaptc.errors import Problem
from adaptc.graph import Graph
from adaptc.near_misses import no_match
from adaptc.quantize import Quantize
from adaptc.registry import load_passes
from adaptc.select import Selection
from adaptc.spec import Spec


@dataclass(frozen=True)
class PlannedQuantization:
    """Weights to store in few bits: an entry of `quantize`."""

    entry: int
    item: Quantize
    selection: Selection


def quantizations_of(spec: Spec, graph: Graph) -> list[PlannedQuantization]:
    """What the entries of `quantize` store in few bits."""
    found = []
    for index, entry in enumerate(spec.quantize):
        make: Any = load_passes()[f"quantize-{entry.method}"]
        item = make(target=entry.target, exclude=entry.exclude, entry=index, **entry.options())
        found.append(PlannedQuantization(index, item, item.selection(graph)))
    return found


def quantize_problems(spec: Spec, graph: Graph, planned: PlannedQuantization) -> list[Problem]:
    """Why an entry cannot be done: its target matches nothing, or matrices that the scheme does not take."""
    item, place = planned.item, ("quantize", planned.entry)
    scheme = item.scheme
    if not planned.selection.sites:
        return [spec.source.problem((*place, "target"), *no_match(graph, scheme, planned.selection, False))]
    found: dict[Any, Problem] = {}
    for site in planned.selection.sites:
        refused = item.refused(graph, site)
        if refused:
            words = f"{scheme.name}: {refused[1]}"
            found.setdefault(refused[0], spec.source.problem((*place, *refused[0]), words, f"site {site}"))
    return list(found.values())


def named_twice(spec: Spec, planned: Sequence[PlannedQuantization]) -> list[Problem]:
    """Weights that two entries store."""
    taken: dict[str, int] = {}
    problems = []
    for found in planned:
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
        where = f"quantize.{found.entry}"
        notes += [f"{where}: pattern {pattern!r} matches nothing" for pattern in found.selection.unused]
        if found.selection.heads:
            notes.append(f"{where}: all-linear leaves out the output head {', '.join(found.selection.heads)}")
        for site in found.selection.sites:
            others = elsewhere(graph, site)
            if others:
                notes.append(
                    f"{where}: {site.name} is also used by {places(others)}, which read the same bits"
                )
    return notes
