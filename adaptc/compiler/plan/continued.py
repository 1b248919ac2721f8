"""Parameters that an adapter holds whole and that are trained whole once more: they start as the adapter has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from adaptc.checkpoints.adapter_checks import load, match
from adaptc.checkpoints.graph_records import weight_order
from adaptc.checkpoints.peft_keys import PeftLayout
from adaptc.compiler.plan.adapters import PlannedInsertion
from adaptc.compiler.plan.replaced import without_effect, without_sites
from adaptc.errors import WeightError
from adaptc.ir.graph import Graph
from adaptc.methods.site import WeightSite
from adaptc.spec.spec import Spec
from adaptc.weights import Deferred, Weight


def with_starts(spec: Spec, graph: Graph, entries: Sequence[PlannedInsertion]) -> list[PlannedInsertion]:
    """The entries of a plan, where what trains a parameter whole starts from what a trained adapter holds of it.

    The adapter is left out there, since nothing of it has an effect any more. Where an entry between the two changes
    the parameter, they stay as they are, and inserting them is refused.

    Raises:
        WeightError: the adapter's tensor is missing, or has another shape.
    """
    planned = list(entries)
    for position, item in enumerate(entries):
        if item.checkpoint is not None or not item.insert.method.replaces:
            continue
        wanted = {site.name for site in item.selection.sites}
        for before in range(position - 1, -1, -1):
            earlier = planned[before]
            met = [s for s in earlier.selection.sites if isinstance(s, WeightSite) and s.name in wanted]
            wanted -= {site.name for site in met}
            if met and earlier.checkpoint is not None and earlier.insert.method.replaces:
                starts = {
                    site.pattern: dict.fromkeys(
                        item.insert.method.at(site).stored(site), _held(spec, graph, planned, earlier, site)
                    )
                    for site in met
                }
                planned[position] = replace(planned[position], starts={**planned[position].starts, **starts})
                planned[before] = without_sites(graph, earlier, met)
                planned = [_told(one, earlier, met) for one in planned]
    return [
        one
        for one, was in zip(planned, entries, strict=True)
        if one.selection.sites or not was.selection.sites
    ]


def _held(
    spec: Spec,
    graph: Graph,
    entries: Sequence[PlannedInsertion],
    planned: PlannedInsertion,
    site: WeightSite,
) -> Weight:
    """What a checkpoint holds in the place of a parameter.

    Raises:
        WeightError: it is missing, or has another shape.
    """
    checkpoint = planned.checkpoint
    assert checkpoint is not None
    members = [p for p in entries if p.checkpoint is not None and p.checkpoint.path == checkpoint.path]
    layout = PeftLayout([s for p in members for s in p.selection.sites], weight_order(graph))
    (param,) = planned.insert.method.at(site).stored(site).values()
    key = site.key(param.key) if checkpoint.in_adaptc_format else layout.key(site, param)
    held = {name: tensor for name, tensor in checkpoint.tensors.items() if name == key}
    alone = replace(checkpoint, tensors=held)
    try:
        match(alone, {key: param})
    except WeightError as error:
        raise spec.weight_error((*spec.place(planned.entry), "adapter"), error) from None
    return Deferred(held[key].shape, held[key].dtype, lambda: load(alone, {key: param})[key])


def _told(
    planned: PlannedInsertion, earlier: PlannedInsertion, sites: Sequence[WeightSite]
) -> PlannedInsertion:
    """A planned insertion whose checkpoint says, if it is that of the earlier one, what is trained on from it."""
    assert earlier.checkpoint is not None
    if planned.checkpoint is None or planned.checkpoint.path != earlier.checkpoint.path:
        return planned
    modules = tuple(dict.fromkeys(site.module for site in sites))
    note = f"a later entry trains {', '.join(modules)} on, from what this one holds"
    return replace(planned, checkpoint=without_effect(planned.checkpoint, modules, note))
