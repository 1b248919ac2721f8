"""What a later adapter puts in the place of an earlier one's: of two trained heads the later one counts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from adaptc.checkpoints.adapter import Checkpoint
from adaptc.compiler.plan.adapters import PlannedInsertion
from adaptc.ir.graph import Graph
from adaptc.methods.point_sites import Site
from adaptc.methods.site import WeightSite
from adaptc.patterns import literal


def without_replaced(graph: Graph, entries: Sequence[PlannedInsertion]) -> list[PlannedInsertion]:
    """The trained adapters of a plan, without what a later one replaces whole; the others as they are.

    PEFT does the same to a model that is trained with one adapter, merged, and trained with the next.
    """
    counted: list[PlannedInsertion] = []
    later: set[str] = set()
    idle: dict[Path, dict[str, None]] = {}
    for planned in reversed(entries):
        if planned.checkpoint is None:
            later.clear()  # what is trained on here starts from all that is before it
            counted.append(planned)
            continue
        gone = [site for site in planned.selection.sites if _is_replaced(planned, site, later)]
        if gone:
            idle.setdefault(planned.checkpoint.path, {}).update((site.module, None) for site in gone)
        if len(gone) < len(planned.selection.sites) or not gone:
            counted.append(without_sites(graph, planned, gone) if gone else planned)
        if planned.insert.method.replaces:
            later |= {site.name for site in planned.selection.sites}
    return [_told(planned, idle) for planned in reversed(counted)]


def _is_replaced(planned: PlannedInsertion, site: Site, later: set[str]) -> bool:
    """Whether everything that a method changes at a site is replaced later."""
    if not isinstance(site, WeightSite) or site.name not in later:
        return False
    bias = site.bias if planned.insert.method.at(site).adapts_bias() else None
    return bias is None or bias in later


def without_sites(graph: Graph, planned: PlannedInsertion, gone: Sequence[Site]) -> PlannedInsertion:
    """A planned insertion without some of its sites."""
    names = tuple(literal(site.name) for site in gone)
    insert = replace(planned.insert, exclude=(*planned.insert.exclude, *names))
    return replace(planned, insert=insert, selection=insert.selection(graph))


def _told(planned: PlannedInsertion, idle: Mapping[Path, Iterable[str]]) -> PlannedInsertion:
    """A planned insertion whose checkpoint says which of its modules have no effect."""
    if planned.checkpoint is None or planned.checkpoint.path not in idle:
        return planned
    modules = tuple(idle[planned.checkpoint.path])
    note = f"a later adapter holds {', '.join(modules)} whole, so that this one has no effect there"
    return replace(planned, checkpoint=without_effect(planned.checkpoint, modules, note))


def without_effect(checkpoint: Checkpoint, modules: Iterable[str], note: str) -> Checkpoint:
    """A checkpoint that has no effect on some modules any more, and a note that says why."""
    replaced = tuple(dict.fromkeys((*checkpoint.replaced, *modules)))
    return replace(checkpoint, replaced=replaced, notes=(*checkpoint.notes, note))
