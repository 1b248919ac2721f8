"""Aliases: one tensor that several places use, under one name or several."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from torch import fx

from adaptc.sites import Site, module_of

if TYPE_CHECKING:
    from adaptc.graph import Graph

OnAlias = Literal["refuse", "untie", "live"]
"""What an adapted tensor that is used elsewhere too becomes: not folded into, its own tensor, or a live expression."""


def users(graph: Graph, name: str) -> list[fx.Node]:
    """Who uses a tensor, under any of its names, outside the inserted expressions; after them, who uses those."""
    same = set(names(graph, name))
    queue = [n for n in graph.nodes if n.op == "get_attr" and n.target in same]
    found: dict[fx.Node, None] = {}
    seen: set[fx.Node] = set()
    while queue:
        for user in queue.pop().users:
            if user in seen:
                continue
            seen.add(user)
            if user.meta.get("adaptation") is None:
                found[user] = None
            else:
                queue.append(user)
    return list(found)


def names(graph: Graph, name: str) -> list[str]:
    """Every name of the tensor that has this one, in the model's order."""
    return [other for other, first in graph.aliases.items() if first == graph.aliases[name]]


def elsewhere(graph: Graph, site: Site) -> list[fx.Node]:
    """Who else uses a site's tensor."""
    own = {use.node for use in site.uses}
    return [user for user in users(graph, site.parameter) if user.name not in own]


def places(found: Iterable[fx.Node]) -> str:
    """The modules that nodes came from, in words."""
    return ", ".join(sorted({module_of(user)[0] or str(user.target) for user in found}))


def untie(graph: Graph, site: Site, nodes: dict[str, fx.Node]) -> Site:
    """Give a site a tensor of its own where others use the same one; gives the site as it is then.

    The site keeps its module's own name for the tensor, and the others keep theirs; where there is one name only,
    the site's tensor gets a new one.
    """
    # An earlier site of the same tensor may have been untied since this one was chosen.
    site = replace(site, parameter=next(s.parameter for s in graph.sites if s.uses[0] == site.uses[0]))
    others = elsewhere(graph, site)
    if not others or (site.parameter, site.uses[0].node) in graph.adapted:
        return site
    known = names(graph, site.parameter)
    own = f"{site.module}.{site.leaf}" if f"{site.module}.{site.leaf}" in known else site.parameter
    rest = [name for name in known if name != own]
    if not rest:
        own, rest = f"{own}_untied", known
        graph.attach(own, graph.weights[rest[0]])
    graph.aliases[own] = own
    graph.aliases.update(dict.fromkeys(rest, rest[0]))
    mine, theirs = (graph.parameter_node(name) for name in (own, rest[0]))
    moved = {use.node for use in site.uses}
    for old in [n for n in graph.nodes if n.op == "get_attr" and n.target in known]:
        for user in list(old.users):
            user.replace_input_with(old, mine if user.name in moved else theirs)
    for node in (mine, theirs):
        nodes[node.name] = node

    def renamed(other: Site) -> Site:
        name = own if other.uses[0].node in moved else rest[0]
        return replace(other, parameter=name) if other.parameter in known else other

    graph.sites = tuple(renamed(other) for other in graph.sites)
    graph.adaptations[:] = [replace(a, site=renamed(a.site)) for a in graph.adaptations]
    for name, use in [key for key in graph.adapted if key[0] in known]:
        graph.adapted[rest[0], use] = graph.adapted.pop((name, use))
    return replace(site, parameter=own)
