"""Fold: every weight expression becomes one stored weight, under the base's own name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from adaptc.aliases import names, others, places
from adaptc.errors import Refusal
from adaptc.expression import Folded, cut
from adaptc.graph import Adaptation, Graph
from adaptc.method import WeightMethod
from adaptc.pipeline import Pass, graph_pass
from adaptc.sites import Use
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
                beside = others(graph, name, uses) or _otherwise(graph, name, uses)
                if not beside or adaptation.on_alias == "live":
                    continue
                leaf = site.leaf if name == site.parameter else name.rpartition(".")[2]
                words = (
                    f"{site.module}.{leaf} cannot be folded into: the same tensor is also used by {places(beside)}, "
                    "which would change too\n"
                    "  write `on_alias: untie` in its entry to give this layer a tensor of its own, "
                    "`on_alias: live` to keep its adapter live (`adapters: live`: all), or leave it out"
                )
                refusals.append(Refusal(words, tuple(user.name for user in beside)))
        return refusals

    def call(self, graph: Graph) -> bool:
        """Cut out, store, and read the stored weight instead; what must stay live does."""
        nodes = graph.by_name()
        folded: dict[str, Weight] = {}
        live: list[Adaptation] = []
        for adaptation in graph.adaptations:
            for name, uses in _places(adaptation):
                if name in folded:
                    continue
                if others(graph, name, uses) or _otherwise(graph, name, uses):
                    live.append(adaptation)
                    break
                value = graph.value_of(name, uses, nodes)
                weight = graph.weights[name]
                folded[name] = Folded(weight.shape, weight.dtype, cut(graph, value))
                stored = graph.parameter_node(name)
                for use in uses:
                    nodes[use.node].replace_input_with(value, stored)
        _forget(graph, live)
        for name, weight in folded.items():
            graph.adapted = {key: value for key, value in graph.adapted.items() if key[0] != name}
            for alias in names(graph, name):
                graph.weights[alias] = weight
        graph.module.graph.eliminate_dead_code()
        return bool(folded)

    def ensures(self, graph: Graph) -> str | None:
        """Nothing of any expression is left, but of those that stay live."""
        left = [node.name for node in graph.nodes if node.meta.get("adaptation") is not None]
        return f"not folded: {', '.join(left)}" if left and not graph.adaptations else None


def _forget(graph: Graph, live: list[Adaptation]) -> None:
    """Drop all adaptations but these, whose nodes are numbered anew."""
    numbers = {index: live.index(a) for index, a in enumerate(graph.adaptations) if a in live}
    for node in graph.nodes:
        if node.meta.get("adaptation") is not None:
            node.meta["adaptation"] = numbers.get(node.meta["adaptation"], -1)
    kept = {name for adaptation in live for name, _ in adaptation.params.values()}
    for name in graph.adapter_names:
        if name not in kept:
            del graph.weights[name], graph.aliases[name]
    graph.adaptations[:] = live


def _otherwise(graph: Graph, name: str, uses: tuple[Use, ...]) -> list[fx.Node]:
    """Which of these uses read another value than the first: a later method adapted the tensor for some of them."""
    nodes = graph.by_name()
    value = graph.adapted.get((name, uses[0].node))
    return [
        user
        for user in (nodes[use.node] for use in uses)
        if value is not None and nodes[value] not in user.all_input_nodes
    ]


def _places(adaptation: Adaptation) -> Iterator[tuple[str, tuple[Use, ...]]]:
    """The weight that a method adapts and where it is used; the bias too where the method adapts it."""
    site, method = adaptation.site, adaptation.method
    yield site.parameter, site.uses
    if site.bias is not None and isinstance(method, WeightMethod) and method.adapts_bias():
        yield site.bias, site.bias_uses
