"""Root mean square norms as the one operation that ONNX Runtime has for them."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import fx

from adaptc.ir.graph import Graph
from adaptc.ir.nodes import arguments_by_name, is_tensor, operation
from adaptc.rewriter.pipeline import Pass

onnx: Any = torch.ops.adaptc_onnx
CASTS = ("to", "_to_copy", "clone", "contiguous")
"""Operations that leave a value of the same dtype as it is."""


@dataclass(frozen=True)
class Norm:
    """`x / sqrt(mean(x²) + epsilon) * weight`, over the last axis.

    Attributes:
        x: what is normed.
        weight: the scale, `(features,)`.
        epsilon: what is added to the mean.
        result: the last of its operations.
    """

    x: fx.Node
    weight: fx.Node
    epsilon: float
    result: fx.Node


@dataclass(frozen=True)
class RootMeanSquareNorms(Pass):
    """A root mean square norm in float32 becomes SimplifiedLayerNormalization."""

    name: ClassVar[str] = "root-mean-square-norms"
    takes: ClassVar[frozenset[str]] = frozenset({"evaluated"})
    changes_results: ClassVar[bool] = True

    def call(self, graph: Graph) -> bool:
        """Replace every norm."""
        norms = [norm for node in graph.nodes if (norm := norm_at(node)) is not None]
        for norm in norms:
            with graph.module.graph.inserting_before(norm.result):
                y = graph.call(onnx.rms_norm.default, norm.x, norm.weight, norm.epsilon, like=norm.result)
            norm.result.replace_all_uses_with(y)
        return bool(norms)


def norm_at(node: fx.Node) -> Norm | None:
    """The norm whose reciprocal square root this node is; None if it is none."""
    if operation(node) != "rsqrt":
        return None
    added: Any = node.args[0]
    if operation(added) != "add" or not isinstance(added.args[1], float):
        return None
    mean: Any = added.args[0]
    power: Any = mean.args[0] if operation(mean) == "mean" else None
    if power is None or operation(power) != "pow" or power.args[1] != 2:
        return None
    x, options = cast(fx.Node, power.args[0]), arguments_by_name(mean)
    rank = x.meta["val"].dim()
    if [axis % rank for axis in options["dim"] or ()] != [rank - 1] or not options["keepdim"]:
        return None
    if x.meta["val"].dtype != torch.float32:
        return None
    scaled = _product(node)
    if scaled is None or x not in scaled.args:
        return None
    result = _product(scaled)
    weight = next((a for a in result.args if _is_scale(a, x)), None) if result is not None else None
    if result is None or weight is None or result.meta["val"].dtype != torch.float32:
        return None
    return Norm(_uncast(x), cast(fx.Node, weight), added.args[1], result)


def _uncast(node: fx.Node) -> fx.Node:
    """The value upstream of casts that change nothing."""
    while operation(node) in CASTS:
        source = cast(fx.Node, node.args[0])
        if source.meta["val"].dtype != node.meta["val"].dtype:
            break
        node = source
    return node


def _product(node: fx.Node) -> fx.Node | None:
    """The one product that a value goes into, through casts that change nothing."""
    while len(node.users) == 1:
        (user,) = node.users
        if operation(user) == "mul":
            return user
        if operation(user) not in CASTS or user.meta["val"].dtype != node.meta["val"].dtype:
            return None
        node = user
    return None


def _is_scale(value: Any, x: fx.Node) -> bool:
    return is_tensor(value) and tuple(value.meta["val"].shape) == (x.meta["val"].shape[-1],)


@dataclass(frozen=True)
class NormsOfSums(Pass):
    """A sum that is normed, and read elsewhere, becomes SkipSimplifiedLayerNormalization."""

    name: ClassVar[str] = "norms-of-sums"
    takes: ClassVar[frozenset[str]] = frozenset({"evaluated"})
    changes_results: ClassVar[bool] = True

    def call(self, graph: Graph) -> bool:
        """Replace every norm of a sum of two tensors of its shape."""
        norms = [n for n in graph.nodes if n.target is onnx.rms_norm.default and _is_sum(n.args[0])]
        for node in norms:
            total, weight, epsilon = cast(tuple[Any, ...], node.args)
            first = _first_place(graph, node)
            if first is None or not _is_sum(total):  # another norm of it was replaced
                continue
            with graph.module.graph.inserting_before(first):
                both = graph.call(onnx.skip_rms_norm.default, *total.args, weight, epsilon, like=node)
                normed, added = (graph.call(operator.getitem, both, n, like=node) for n in range(2))
            node.replace_all_uses_with(normed)
            total.replace_all_uses_with(added)
        return bool(norms)


def _first_place(graph: Graph, norm: fx.Node) -> fx.Node | None:
    """The node in front of which a sum and its norm can be computed together; None if there is none."""
    place = {node: number for number, node in enumerate(graph.nodes)}
    total, weight = cast(tuple[fx.Node, fx.Node], norm.args[:2])
    if place[weight] < place[total]:
        return total
    return norm if all(place[user] >= place[norm] for user in total.users) else None


def _is_sum(node: Any) -> bool:
    if operation(node) != "add" or not all(is_tensor(a) for a in node.args):
        return False
    return len({str(a.meta["val"].shape) for a in (node, *node.args)}) == 1
