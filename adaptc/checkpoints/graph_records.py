"""Read the records of adapters off a graph: what was inserted, and how PEFT would store it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from adaptc.checkpoints.key_parts import ROOT
from adaptc.checkpoints.peft_keys import PeftLayout
from adaptc.checkpoints.records import AdapterRecord, AdapterTensor
from adaptc.checkpoints.tied import TIED_NAMES
from adaptc.ir.adaptation import Adaptation
from adaptc.ir.aliases import alias_names
from adaptc.ir.graph import Graph
from adaptc.ir.selection import as_stored
from adaptc.methods.method import Method, options_of
from adaptc.methods.param import Param
from adaptc.methods.point_sites import Site
from adaptc.methods.site import MATRIX_KINDS, WeightSite


def records_of(graph: Graph) -> list[AdapterRecord]:
    """The records of everything inserted into a graph: one for each method of an entry with its options, in order."""
    groups: dict[tuple[int, str, str], list[Adaptation]] = {}
    of_entry: dict[tuple[int, str], list[Adaptation]] = {}
    for a in graph.adaptations:
        groups.setdefault((a.entry, repr(a.declared), a.adapter), []).append(a)
        of_entry.setdefault((a.entry, a.adapter), []).append(a)
    return [_record(graph, group, of_entry[entry, adapter]) for (entry, _, adapter), group in groups.items()]


def _record(graph: Graph, group: Sequence[Adaptation], of_entry: Sequence[Adaptation]) -> AdapterRecord:
    """The record of one method.

    Args:
        graph: the graph.
        group: the adaptations by the method.
        of_entry: those by all methods of its entry, which share a checkpoint.
    """
    first, sites = group[0], [a.site for a in group]
    method: Method[Any] = first.declared
    order = weight_order(graph)
    layout, of_method = PeftLayout([a.site for a in of_entry], order), PeftLayout(sites, order)
    every = sum(point.kind == first.site.kind for point in graph.points) if first.stays else 0
    sizes = method.peft.sizes(method, sites, every) if method.peft is not None else {}
    in_peft = (
        of_method.supported
        and sizes is not None
        and all(_in_peft(a, graph) for a in group)
        and _named_by_modules(graph, group, of_entry)
    )
    tensors = {
        name: AdapterTensor(
            name,
            key,
            param.shape,
            argument,
            site,
            param.trained,
            param.stored,
            param.below,
            _copies(a, key, graph) if in_peft else (),
        )
        for a in group
        for argument, (name, param) in a.params.items()
        for key, site in [_key_and_site(a.site, param, a.shares(argument), layout if in_peft else None)]
    }
    modules = tuple(of_method.modules) or tuple(dict.fromkeys(site.module for site in sites))
    others = {site.module for site in graph.sites} - {site.module for site in sites}
    return AdapterRecord(
        adapter=first.adapter,
        entry=first.entry,
        method=first.method.name,
        options=plain_options(method),
        modules=() if of_method.parameters and not of_method.modules else modules,
        parameters=tuple(of_method.parameters),
        patterns=tuple(dict.fromkeys(site.pattern for site in sites)),
        transposed=any(isinstance(site, WeightSite) and site.transposed for site in sites),
        ambiguous=any(other.endswith("." + module) for other in others for module in modules),
        in_peft=in_peft,
        sizes=sizes or {},
        heads=_heads(graph, method) if in_peft else (),
        tied=any(_tied_modules(a, graph) for a in group),
        tensors=tuple(tensors.values()),
    )


def _named_by_modules(graph: Graph, group: Sequence[Adaptation], of_entry: Sequence[Adaptation]) -> bool:
    """Whether the names of modules say which parameters a method trains: all of each, or the biases that `bias` means.

    PEFT names no single parameter, nor the model itself.
    """
    sites = [a.site for a in group if isinstance(a.site, WeightSite)]
    if any(not site.module for site in sites):
        return False
    trained = {site.name for site in sites if site.kind == "parameter"}
    modules = {site.module for site in sites if site.name in trained}
    if (
        trained
        and all(name.endswith(".bias") for name in trained)
        and any(_trains_biases(a) for a in of_entry)
    ):
        return True
    names = [site.name for site in graph.sites]
    return {name for name in names for module in modules if name.startswith(f"{module}.")} <= trained


def _trains_biases(a: Adaptation) -> bool:
    """Whether a method has an option by which PEFT trains biases beside it, and that is set."""
    return getattr(a.declared, "biases", "none") != "none"


def _tied_modules(a: Adaptation, graph: Graph) -> list[str]:
    """The other modules that an adaptation changes with its own, since they share its tensor (`on_alias: share`)."""
    site = a.site
    if a.on_alias != "share" or not isinstance(site, WeightSite):
        return []
    modules = [name.rpartition(".")[0] for name in alias_names(graph, site.parameter)]
    return [module for module in modules if module != site.module]


def _copies(a: Adaptation, key: str, graph: Graph) -> tuple[str, ...]:
    """The keys of the same tensor for tied modules: PEFT writes what is trained whole under each of its names."""
    if not isinstance(a.site, WeightSite) or a.site.kind != "parameter" or not a.site.module:
        return ()
    return tuple(key.replace(a.site.module, module, 1) for module in _tied_modules(a, graph))


def plain_options(method: Method[Any]) -> dict[str, Any]:
    """The options of a method as JSON holds them."""
    return json.loads(json.dumps(options_of(method), default=list))


def weight_order(graph: Graph) -> dict[str, int]:
    """Name of a weight -> its position in the model, from 0."""
    return {name: index for index, name in enumerate(graph.weights)}


def _heads(graph: Graph, method: Method[Any]) -> tuple[str, ...]:
    """The base's own tensors in the heads that PEFT saves along, without those that any entry adapts."""
    heads: frozenset[str] = method.peft.heads if method.peft is not None else frozenset()
    adapted = {a.site.parameter for a in graph.adaptations}
    parameters = [
        n for n in graph.weights if n not in graph.inserted and n not in graph.buffers and n not in adapted
    ]
    return tuple(name for name in parameters if not heads.isdisjoint(name.split(".")))


def _key_and_site(site: Site, param: Param, shared: bool, layout: PeftLayout | None) -> tuple[str, str]:
    """The key of a tensor, and the site it belongs to ("" if all sites share it)."""
    if shared:
        return f"{ROOT}{param.key}", ""
    key = layout.key(site, param) if layout is not None else site.key(param.key)
    return key, site.pattern if site.kind in MATRIX_KINDS else site.name


def _in_peft(a: Adaptation, graph: Graph) -> bool:
    """Whether PEFT computes the same from what is stored: it adapts no slices, and parameters as they are stored."""
    site = a.site
    if not a.declared.in_peft(site) or not _ties_in_peft(a, graph):
        return False
    return not isinstance(site, WeightSite) or (
        not site.rows and as_stored(site, graph).layout == site.layout
    )


def _ties_in_peft(a: Adaptation, graph: Graph) -> bool:
    """Whether PEFT keeps the tensor of an adaptation tied, where adaptc does."""
    format, tied = a.declared.peft, _tied_modules(a, graph)
    if format is None or not tied or format.tied:
        return True
    return format.ties and isinstance(a.site, WeightSite) and a.site.module.rpartition(".")[2] in TIED_NAMES
