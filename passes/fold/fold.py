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
from adaptc.methods.site import Use, WeightSite
from adaptc.rewriter.expression import FoldedWeight, extract_expression
from adaptc.rewriter.pipeline import Pass, graph_pass
from adaptc.rewriter.quantize import drop_unread_quantized
from adaptc.weights import Weight


@graph_pass("fold")
@dataclass(frozen=True)
class Fold(Pass):
    """Replace `E(W, θ)` by its value, named as W was (PEFT: merge): the graph has the base's operations, one for one.

    Methods on activations, attentions and inputs stay live; what they compute from weights alone becomes a constant.
    """

    takes: ClassVar[frozenset[str]] = frozenset({"adapted"})
    leaves: ClassVar[str | None] = "folded"

    def requires(self, graph: Graph) -> list[Refusal]:
        """No tensor that is folded into is used anywhere else, where it would change too."""
        refusals: list[Refusal] = []
        nodes = graph.by_name()
        for adaptation in graph.adaptations:
            site = adaptation.site
            for name, uses in _adapted_tensors(adaptation):
                others = _other_readers(graph, name, uses, nodes)
                if not others or adaptation.on_alias == "live":
                    continue
                leaf = name.rpartition(".")[2]
                if isinstance(site, WeightSite) and name == site.parameter:
                    leaf = site.leaf
                reason = (
                    f"{site.module}.{leaf} cannot be folded into: the same tensor is also used by "
                    f"{module_names(others)}, which would change too"
                )
                advice = (
                    "write `on_alias: untie` in its entry to give this layer a tensor of its own, "
                    "`on_alias: live` to keep its adapter live (`adapters: live`: all), or leave it out"
                )
                refusals.append(Refusal(reason, tuple(user.name for user in others), (advice,)))
        return refusals

    def call(self, graph: Graph) -> bool:
        """Extract every expression, and let its users read the folded weight; adaptations that must stay live do."""
        nodes = graph.by_name()
        folded: dict[str, Weight] = {}
        live: list[Adaptation] = []
        for adaptation in graph.adaptations:
            if adaptation.stays:
                live.append(adaptation)
            for name, uses in _adapted_tensors(adaptation):
                if name in folded:
                    continue
                if _other_readers(graph, name, uses, nodes):
                    live.append(adaptation)
                    break
                value = graph.current_value(name, uses, nodes)
                shape, dtype = _shape_and_dtype(graph, adaptation, name)
                folded[name] = FoldedWeight(shape, dtype, extract_expression(graph, value))
                if name in graph.quantized:
                    graph.restore(name, folded[name])
                stored = graph.parameter_node(name)
                for use in uses:
                    nodes[use.node].replace_input_with(value, stored)
        computed = [store_constants(graph, adaptation) for adaptation in live]
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
        return bool(folded) or any(computed)

    def ensures(self, graph: Graph) -> str | None:
        """No node is left of an adaptation that does not stay live."""
        live = {None, *graph.adaptations}
        remaining = [node.name for node in graph.nodes if node.meta.get(ADAPTATION) not in live]
        return f"not folded: {', '.join(f'%{name}' for name in remaining)}" if remaining else None


def _forget_unread(graph: Graph) -> None:
    """Drop tensors of live adaptations that nothing reads any more, such as those of a prompt encoder."""
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    unread = [name for a in graph.adaptations if a.stays for name, _ in a.params.values() if name not in read]
    for name in dict.fromkeys(unread):
        graph.detach(name)
    graph.revise(lambda a: replace(a, params={k: v for k, v in a.params.items() if v[0] not in unread}))


def _shape_and_dtype(graph: Graph, adaptation: Adaptation, name: str) -> tuple[tuple[int, ...], torch.dtype]:
    """The shape and dtype of the weight that is folded into; of a quantized one those of its dequantized value."""
    if name in graph.quantized:
        return adaptation.site.shape, adaptation.site.dtype
    return graph.weights[name].shape, graph.weights[name].dtype


def _forget(graph: Graph, live: list[Adaptation]) -> None:
    """Drop all adaptations but those that stay live, and the tensors that only they had."""
    live_names = {name for adaptation in live for name, _ in adaptation.params.values()}
    for name in graph.inserted:
        if name not in live_names:
            graph.detach(name)
    graph.adaptations[:] = live


def _other_readers(
    graph: Graph, name: str, uses: tuple[Use, ...], nodes: Mapping[str, fx.Node]
) -> list[fx.Node]:
    """The nodes that read a tensor but not its adapted value, so that folding into it would change them.

    These are the tensor's users besides `uses`, and what reads a value that another method has put in its place. If
    there are none: those of `uses` that read another value than the first, since a later method may have adapted the
    tensor for some of its uses only.
    """
    names, here = set(alias_names(graph, name)), {use.node for use in uses}
    replaced = [nodes[use] for tensor, use in graph.adapted_weights if tensor in names and use not in here]
    others = list(dict.fromkeys([*other_users(graph, name, uses), *replaced]))
    value = graph.adapted_weights.get((name, uses[0].node))
    if others or value is None:
        return others
    return [nodes[use.node] for use in uses if nodes[value] not in nodes[use.node].all_input_nodes]


def _adapted_tensors(adaptation: Adaptation) -> Iterator[tuple[str, tuple[Use, ...]]]:
    """The name of the weight that a method adapts, and its uses; the bias's too where the method adapts it."""
    site, method = adaptation.site, adaptation.method
    if adaptation.stays or not isinstance(site, WeightSite):
        return
    yield site.parameter, site.uses
    if site.bias is not None and isinstance(method, WeightMethod) and method.adapts_bias():
        yield site.bias, site.bias_uses


def store_constants(graph: Graph, adaptation: Adaptation) -> bool:
    """Store what is computed from an adaptation's tensors and other weights alone; True if there is anything."""
    constant = {n for n in graph.nodes if n.op == "get_attr" and n.target != "training"}
    names = {name for name, _ in adaptation.params.values()}
    derived = {n for n in constant if n.target in names}
    for node in graph.nodes:
        operands = node.all_input_nodes
        if node.op == "call_function" and operands and constant.issuperset(operands):
            constant.add(node)
            derived |= {node} if derived.intersection(operands) else set()
    results = [n for n in derived if n.op != "get_attr" and not constant.issuperset(n.users)]
    order = {node: index for index, node in enumerate(graph.nodes)}
    for number, node in enumerate(sorted(results, key=order.__getitem__)):
        value, method = node.meta["val"], adaptation.method.name.replace("-", "_")
        name = ".".join(p for p in (adaptation.site.module, f"{method}_{number}", adaptation.adapter) if p)
        graph.attach(name, FoldedWeight(tuple(value.shape), value.dtype, extract_expression(graph, node)))
        node.replace_all_uses_with(graph.parameter_node(name))
    for node in sorted(
        derived, key=order.__getitem__, reverse=True
    ):  # torch never drops an operation in place
        if node.op != "get_attr" and not node.users:
            graph.module.graph.erase_node(node)
    return bool(results)
