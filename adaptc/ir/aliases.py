"""Aliases: one tensor that several operations use, under one name or several."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import fx

from adaptc.ir.analysis.dataflow import walk
from adaptc.ir.graph import Graph
from adaptc.ir.nodes import ADAPTATION, module_of
from adaptc.methods.point_sites import InputSite, Site
from adaptc.methods.site import Use, WeightSite


def users(graph: Graph, name: str) -> list[fx.Node]:
    """The nodes of the base that use a tensor, under any of its names, directly or through inserted expressions."""
    names = set(alias_names(graph, name))
    dequantized = {graph.quantized[n].value for n in names & graph.quantized.keys()}
    tensors = [n for n in graph.nodes if (n.op == "get_attr" and n.target in names) or n.name in dequantized]
    reached = walk(
        [user for node in tensors for user in node.users],
        lambda node: node.users,
        lambda node: node.meta.get(ADAPTATION) is None,
    )
    return [node for node in reached if node.meta.get(ADAPTATION) is None]


def alias_names(graph: Graph, name: str) -> list[str]:
    """Every name of the tensor that has this name, in the model's order."""
    return [other for other, first in graph.aliases.items() if first == graph.aliases[name]]


def used_elsewhere(graph: Graph, site: WeightSite, bias: bool = False) -> list[fx.Node]:
    """The nodes that use the weight of a site, or its bias, besides the site itself."""
    name, uses = (site.bias, site.bias_uses) if bias else (site.parameter, site.uses)
    return other_users(graph, name, uses) if name else []


def other_users(graph: Graph, name: str, uses: Sequence[Use]) -> list[fx.Node]:
    """The nodes that use a tensor besides these uses."""
    used_here = {use.node for use in uses}
    return [user for user in users(graph, name) if user.name not in used_here]


def module_names(nodes: Iterable[fx.Node]) -> str:
    """The names of the modules that nodes come from, as a list in text; of the root's nodes their operations."""
    return ", ".join(sorted({module_of(node)[0] or str(node.target) for node in nodes}))


def with_all_uses(graph: Graph, site: WeightSite) -> WeightSite:
    """The site with all other uses of its tensor among its uses, in the order of execution."""
    names = set(alias_names(graph, site.parameter))
    order = {node.name: index for index, node in enumerate(graph.nodes)}
    tied = [other for other in graph.sites if other.parameter in names]
    uses = {*site.uses, *(use for other in tied for use in (*other.uses, *other.foreign))}
    return replace(site, uses=tuple(sorted(uses, key=lambda use: order[use.node])))


def untie(graph: Graph, site: WeightSite, nodes: dict[str, fx.Node], bias: bool) -> WeightSite:
    """Give a site a tensor of its own, where other operations use its tensor too.

    Args:
        graph: changed in place.
        site: the site.
        nodes: all nodes by name; new ones are added.
        bias: do so for the site's bias too.

    Returns:
        the site with the new names of its tensors.
    """
    # An earlier site of the same tensor may have been untied since this one was chosen.
    current = next(s for s in graph.sites if (s.module, s.leaf) == (site.module, site.leaf))
    parameter = _separated(graph, current.parameter, site.module, site.uses, nodes)
    bias_name = current.bias if site.bias else None  # a site that is itself a bias has none
    if bias_name and bias:
        bias_name = _separated(graph, bias_name, site.module, site.bias_uses, nodes)
    return replace(site, parameter=parameter, bias=bias_name)


def _separated(graph: Graph, name: str, module: str, uses: Sequence[Use], nodes: dict[str, fx.Node]) -> str:
    """Give uses of a tensor a tensor of their own if other nodes use it too.

    The new tensor has the name that is in the module; the other names stay with the old one. A tensor with one name
    only keeps it, and the new tensor gets another.

    Returns:
        the name of the tensor of these uses.
    """
    moved = {use.node for use in uses}
    if (
        all(user.name in moved for user in users(graph, name))
        or (name, uses[0].node) in graph.adapted_weights
    ):
        return name
    names = alias_names(graph, name)
    new = next((n for n in names if n.rpartition(".")[0] == module), name)
    others = [n for n in names if n != new]
    if not others:
        new, others = f"{new}_untied", names
        graph.attach(new, graph.weights[others[0]])
    graph.aliases[new] = new
    graph.aliases.update(dict.fromkeys(others, others[0]))
    new_node, old_node = (graph.parameter_node(n) for n in (new, others[0]))
    for read in [n for n in graph.nodes if n.op == "get_attr" and n.target in names]:
        for user in list(read.users):
            user.replace_input_with(read, new_node if user.name in moved else old_node)
    for node in (new_node, old_node):
        nodes[node.name] = node

    def name_now(tensor: str, at: Sequence[Use]) -> str:
        return tensor if tensor not in names else new if at[0].node in moved else others[0]

    def renamed(site: WeightSite) -> WeightSite:
        bias = name_now(site.bias, site.bias_uses) if site.bias else None
        return replace(site, parameter=name_now(site.parameter, site.uses), bias=bias)

    def renamed_site(site: Site) -> Site:
        if isinstance(site, WeightSite):
            return renamed(site)
        if isinstance(site, InputSite):
            return replace(site, table=name_now(site.table, site.uses))
        return site

    graph.sites = tuple(renamed(site) for site in graph.sites)
    graph.revise(lambda adaptation: replace(adaptation, site=renamed_site(adaptation.site)))
    for tensor, use in [key for key in graph.adapted_weights if key[0] in names]:
        graph.adapted_weights[others[0], use] = graph.adapted_weights.pop((tensor, use))
    return new


def unread_modules(module: fx.GraphModule) -> tuple[str, ...]:
    """The modules of a base none of whose own parameters a node reads: no output depends on them."""
    tensors = dict(module.named_parameters(remove_duplicate=False))
    read = {
        id(tensors[str(n.target)]) for n in module.graph.nodes if n.op == "get_attr" and n.target in tensors
    }
    is_read: dict[str, bool] = {}
    for name, tensor in tensors.items():
        owner = name.rpartition(".")[0]
        is_read[owner] = is_read.get(owner, False) or id(tensor) in read
    return tuple(name for name, value in is_read.items() if name and not value)
