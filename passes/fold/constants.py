"""Fold: every weight expression becomes one stored weight, under the base's own name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from adaptc.errors import Refusal
from adaptc.expression import Folded, cut
from adaptc.graph import Adaptation, Graph
from adaptc.method import WeightMethod
from adaptc.pipeline import Pass, graph_pass
from adaptc.sites import Use, module_of
from adaptc.weights import Weight


@graph_pass("fold")
@dataclass(frozen=True)
class Fold(Pass):
    """Replace `E(W, θ)` by its value, named as W was: the folded graph has the base's operations, one for one."""

    takes: ClassVar[frozenset[str]] = frozenset({"adapted"})
    leaves: ClassVar[str | None] = "folded"

    def requires(self, graph: Graph) -> list[Refusal]:
        """No tensor that is folded into may be used anywhere else: it would change there too."""
        refusals = []
        for adaptation in graph.adaptations:
            site = adaptation.site
            for name, uses in _places(adaptation):
                own = {use.node for use in uses}
                others = [user for user in _users(graph, name) if user.name not in own]
                if not others:
                    continue
                where = sorted({module_of(user)[0] or str(user.target) for user in others})
                leaf = site.leaf if name == site.parameter else name.rpartition(".")[2]
                words = (
                    f"{site.module}.{leaf} cannot be folded into: the same tensor is also used by {', '.join(where)}, "
                    "which would change too\n"
                    "  keep the adapter live (`adapters: live`), or leave this layer out of the target"
                )
                refusals.append(Refusal(words, tuple(user.name for user in others)))
        return refusals

    def call(self, graph: Graph) -> bool:
        """Cut out, store, and read the stored weight instead."""
        nodes = graph.by_name()
        folded: dict[str, Weight] = {}
        for name, uses in (place for adaptation in graph.adaptations for place in _places(adaptation)):
            if name in folded:
                continue
            value = graph.value_of(name, uses, nodes)
            weight = graph.weights[name]
            folded[name] = Folded(weight.shape, weight.dtype, cut(graph, value))
            stored = graph.parameter_node(name)
            for use in uses:
                nodes[use.node].replace_input_with(value, stored)
        for name in graph.adapter_names:
            del graph.weights[name], graph.aliases[name]
        for name, weight in folded.items():
            first_name = graph.aliases[name]
            graph.weights[first_name] = graph.weights[name] = weight
        graph.adaptations.clear()
        graph.adapted.clear()
        graph.module.graph.eliminate_dead_code()
        return bool(folded)

    def ensures(self, graph: Graph) -> str | None:
        """Nothing of any expression is left."""
        left = [node.name for node in graph.nodes if node.meta.get("adaptation") is not None]
        return f"not folded: {', '.join(left)}" if left else None


def _places(adaptation: Adaptation) -> Iterator[tuple[str, tuple[Use, ...]]]:
    """The weight that a method adapts and where it is used; the bias too where the method adapts it."""
    site, method = adaptation.site, adaptation.method
    yield site.parameter, site.uses
    if site.bias is not None and isinstance(method, WeightMethod) and method.adapts_bias():
        yield site.bias, site.bias_uses


def _users(graph: Graph, name: str) -> list[fx.Node]:
    """Who uses a tensor, under any of its names, outside the inserted expressions; after them, who uses those."""
    same = {other for other, first in graph.aliases.items() if first == graph.aliases[name]}
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
