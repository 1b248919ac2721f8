"""Fold: every weight expression becomes one stored weight, under the base's own name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from adaptc.errors import Refusal
from adaptc.ir.adaptation import Adaptation
from adaptc.ir.aliases import alias_names, module_names, other_users
from adaptc.ir.graph import Graph
from adaptc.ir.nodes import ADAPTATION
from adaptc.methods.method import WeightMethod
from adaptc.methods.site import Use
from adaptc.rewriter.expression import FoldedWeight, extract_expression
from adaptc.rewriter.pipeline import Pass, graph_pass
from adaptc.rewriter.quantize import drop_unread_quantized
from adaptc.weights import Weight


@graph_pass("fold")
@dataclass(frozen=True)
class Fold(Pass):
    """Replace `E(W, θ)` by its value, named as W was: the folded graph has the base's operations, one for one.

    What is inserted into activations, attentions and inputs stays; of it, what depends on weights alone is computed.
    """

    takes: ClassVar[frozenset[str]] = frozenset({"adapted"})
    leaves: ClassVar[str | None] = "folded"

    def requires(self, graph: Graph) -> list[Refusal]:
        """No tensor that is folded into may be used anywhere else: it would change there too."""
        refusals, nodes = [], graph.by_name()
        for adaptation in graph.adaptations:
            site = adaptation.site
            for name, uses in _places(adaptation):
                beside = _beside(graph, name, uses, nodes)
                if not beside or adaptation.on_alias == "live":
                    continue
                leaf = site.leaf if name == site.parameter else name.rpartition(".")[2]
                reason = (
                    f"{site.module}.{leaf} cannot be folded into: the same tensor is also used by "
                    f"{module_names(beside)}, which would change too"
                )
                advice = (
                    "write `on_alias: untie` in its entry to give this layer a tensor of its own, "
                    "`on_alias: live` to keep its adapter live (`adapters: live`: all), or leave it out"
                )
                refusals.append(Refusal(reason, tuple(user.name for user in beside), (advice,)))
        return refusals

    def call(self, graph: Graph) -> bool:
        """Cut out, store, and read the stored weight instead; what must stay live does."""
        nodes = graph.by_name()
        folded: dict[str, Weight] = {}
        live: list[Adaptation] = []
        for adaptation in graph.adaptations:
            if adaptation.stays:
                live.append(adaptation)
            for name, uses in _places(adaptation):
                if name in folded:
                    continue
                if _beside(graph, name, uses, nodes):
                    live.append(adaptation)
                    break
                value = graph.current_value(name, uses, nodes)
                folded[name] = FoldedWeight(
                    *_stored(graph, adaptation, name), extract_expression(graph, value)
                )
                if name in graph.quantized:
                    graph.restore(name, folded[name])
                stored = graph.parameter_node(name)
                for use in uses:
                    nodes[use.node].replace_input_with(value, stored)
        settled = [constants(graph, adaptation) for adaptation in live]
        _forget(graph, live)
        for name, weight in folded.items():
            graph.adapted_weights = {
                key: value for key, value in graph.adapted_weights.items() if key[0] != name
            }
            for alias in alias_names(graph, name):
                graph.weights[alias] = weight
        graph.module.graph.eliminate_dead_code()
        _forget_unread(graph)
        drop_unread_quantized(graph, folded)
        return bool(folded) or any(settled)

    def ensures(self, graph: Graph) -> str | None:
        """No expression is left, but of adaptations that stay live."""
        live = {None, *graph.adaptations}
        left = [node.name for node in graph.nodes if node.meta.get(ADAPTATION) not in live]
        return f"not folded: {', '.join(f'%{name}' for name in left)}" if left else None


def _forget_unread(graph: Graph) -> None:
    """Drop tensors of adaptations that stay live which nothing reads any more: those of an encoder of tokens."""
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    gone = [name for a in graph.adaptations if a.stays for name, _ in a.params.values() if name not in read]
    for name in dict.fromkeys(gone):
        graph.detach(name)
    graph.revise(lambda a: replace(a, params={k: v for k, v in a.params.items() if v[0] not in gone}))


def _stored(graph: Graph, adaptation: Adaptation, name: str) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of what is folded into: of the weight, or of that which bits stand for."""
    if name in graph.quantized:
        return adaptation.site.shape, adaptation.site.dtype
    return graph.weights[name].shape, graph.weights[name].dtype


def _forget(graph: Graph, live: list[Adaptation]) -> None:
    """Drop all adaptations but these, and their tensors."""
    kept = {name for adaptation in live for name, _ in adaptation.params.values()}
    for name in graph.inserted:
        if name not in kept:
            graph.detach(name)
    graph.adaptations[:] = live


def _beside(graph: Graph, name: str, uses: tuple[Use, ...], nodes: Mapping[str, fx.Node]) -> list[fx.Node]:
    """Who uses a tensor besides these, or if nobody does, who of these reads another value than the first.

    A later method may have adapted the tensor for some of its uses only.
    """
    found = other_users(graph, name, uses)
    value = graph.adapted_weights.get((name, uses[0].node))
    if found or value is None:
        return found
    return [nodes[use.node] for use in uses if nodes[value] not in nodes[use.node].all_input_nodes]


def _places(adaptation: Adaptation) -> Iterator[tuple[str, tuple[Use, ...]]]:
    """The weight that a method adapts and where it is used; the bias too where the method adapts it."""
    site, method = adaptation.site, adaptation.method
    if adaptation.stays:
        return
    yield site.parameter, site.uses
    if site.bias is not None and isinstance(method, WeightMethod) and method.adapts_bias():
        yield site.bias, site.bias_uses


def constants(graph: Graph, adaptation: Adaptation) -> bool:
    """Store what is computed from an adaptation's tensors alone; True if there is anything."""
    constant = {n for n in graph.nodes if n.op == "get_attr" and n.target != "training"}
    names = {name for name, _ in adaptation.params.values()}
    own = {n for n in constant if n.target in names}
    for node in graph.nodes:
        operands = node.all_input_nodes
        if node.op == "call_function" and operands and constant.issuperset(operands):
            constant.add(node)
            own |= {node} if own.intersection(operands) else set()
    last = [n for n in own if n.op != "get_attr" and not constant.issuperset(n.users)]
    order = {node: index for index, node in enumerate(graph.nodes)}
    for number, node in enumerate(sorted(last, key=order.__getitem__)):
        value, word = node.meta["val"], adaptation.method.name.replace("-", "_")
        name = ".".join(p for p in (adaptation.site.module, f"{word}_{number}", adaptation.adapter) if p)
        graph.attach(name, FoldedWeight(tuple(value.shape), value.dtype, extract_expression(graph, node)))
        node.replace_all_uses_with(graph.parameter_node(name))
    for node in sorted(own, key=order.__getitem__, reverse=True):  # what writes in place is not dead to torch
        if node.op != "get_attr" and not node.users:
            graph.module.graph.erase_node(node)
    return bool(last)
