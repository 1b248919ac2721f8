"""Aliases: one tensor that several places use, under one name or several."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import fx

from adaptc.ir.analysis.dataflow import walk
from adaptc.ir.nodes import ADAPTATION, module_of
from adaptc.methods.point_sites import InputSite, Site
from adaptc.methods.site import Use, WeightSite

if TYPE_CHECKING:
    from adaptc.ir.graph import Graph


def users(graph: Graph, name: str) -> list[fx.Node]:
    """Who uses a tensor, under any of its names, outside the inserted expressions; after them, who uses those."""
    same = set(alias_names(graph, name))
    leaves = {graph.quantized[n].value for n in same & graph.quantized.keys()}
    tensors = [n for n in graph.nodes if (n.op == "get_attr" and n.target in same) or n.name in leaves]
    reached = walk(
        [user for node in tensors for user in node.users],
        lambda node: node.users,
        lambda node: node.meta.get(ADAPTATION) is None,
    )
    return [node for node in reached if node.meta.get(ADAPTATION) is None]


def alias_names(graph: Graph, name: str) -> list[str]:
    """Every name of the tensor that has this one, in the model's order."""
    return [other for other, first in graph.aliases.items() if first == graph.aliases[name]]


def used_elsewhere(graph: Graph, site: WeightSite, bias: bool = False) -> list[fx.Node]:
    """Who else uses a site's tensor, or its bias."""
    name, uses = (site.bias, site.bias_uses) if bias else (site.parameter, site.uses)
    return other_users(graph, name, uses) if name else []


def other_users(graph: Graph, name: str, uses: Sequence[Use]) -> list[fx.Node]:
    """Who uses a tensor besides these."""
    own = {use.node for use in uses}
    return [user for user in users(graph, name) if user.name not in own]


def module_names(found: Iterable[fx.Node]) -> str:
    """The modules that nodes came from, in words."""
    return ", ".join(sorted({module_of(user)[0] or str(user.target) for user in found}))


def with_all_uses(graph: Graph, site: WeightSite) -> WeightSite:
    """The site with everyone else who uses its tensor among its uses, in the order of execution."""
    same, order = (
        set(alias_names(graph, site.parameter)),
        {node.name: i for i, node in enumerate(graph.nodes)},
    )
    every = [other for other in graph.sites if other.parameter in same]
    uses = {*site.uses, *(use for other in every for use in (*other.uses, *other.foreign))}
    return replace(site, uses=tuple(sorted(uses, key=lambda use: order[use.node])))


def untie(graph: Graph, site: WeightSite, nodes: dict[str, fx.Node], bias: bool) -> WeightSite:
    """Give a site tensors of its own, its bias too if asked; gives the site as it is then."""
    # An earlier site of the same tensor may have been untied since this one was chosen.
    known = next(s for s in graph.sites if (s.module, s.leaf) == (site.module, site.leaf))
    own = _separated(graph, known.parameter, site.module, site.uses, nodes)
    beside = known.bias if site.bias else None  # a bias by itself has none
    if beside and bias:
        beside = _separated(graph, beside, site.module, site.bias_uses, nodes)
    return replace(site, parameter=own, bias=beside)


def _separated(graph: Graph, name: str, module: str, uses: Sequence[Use], nodes: dict[str, fx.Node]) -> str:
    """Give uses of a tensor one of their own where others use the same; gives its name.

    The module keeps its own name for the tensor, and the others keep theirs; where there is one name only, the
    module's tensor gets a new one.
    """
    moved = {use.node for use in uses}
    if (
        all(user.name in moved for user in users(graph, name))
        or (name, uses[0].node) in graph.adapted_weights
    ):
        return name
    known = alias_names(graph, name)
    own = next((n for n in known if n.rpartition(".")[0] == module), name)
    rest = [n for n in known if n != own]
    if not rest:
        own, rest = f"{own}_untied", known
        graph.attach(own, graph.weights[rest[0]])
    graph.aliases[own] = own
    graph.aliases.update(dict.fromkeys(rest, rest[0]))
    mine, theirs = (graph.parameter_node(n) for n in (own, rest[0]))
    for old in [n for n in graph.nodes if n.op == "get_attr" and n.target in known]:
        for user in list(old.users):
            user.replace_input_with(old, mine if user.name in moved else theirs)
    for node in (mine, theirs):
        nodes[node.name] = node

    def of(tensor: str | None, at: Sequence[Use]) -> str | None:
        return tensor if tensor not in known else own if at[0].node in moved else rest[0]

    def renamed(site: WeightSite) -> WeightSite:
        bias = of(site.bias, site.bias_uses) if site.bias else None
        return replace(site, parameter=str(of(site.parameter, site.uses)), bias=bias)

    def renamed_place(site: Site) -> Site:
        if isinstance(site, WeightSite):
            return renamed(site)
        if isinstance(site, InputSite):
            return replace(site, table=str(of(site.table, site.uses)))
        return site

    graph.sites = tuple(renamed(site) for site in graph.sites)
    graph.revise(lambda adaptation: replace(adaptation, site=renamed_place(adaptation.site)))
    for tensor, use in [key for key in graph.adapted_weights if key[0] in known]:
        graph.adapted_weights[rest[0], use] = graph.adapted_weights.pop((tensor, use))
    return own
