"""Relative position biases: looked up in a table by the distance of a query and a key, such as T5's."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from adaptc.ir.analysis.dataflow import is_weight, walk
from adaptc.ir.graph import Graph
from adaptc.ir.nodes import PROVENANCE, evaluated, keeps_shape, operation

aten = torch.ops.aten
PASSED = frozenset(
    {
        *("contiguous", "clone", "to", "type_as", "alias", "detach", "_to_copy"),
        *("full_like", "zeros_like", "ones_like"),
    }
)
"""Operations that keep the axes of their operand."""
POINTWISE = frozenset({"where", "min", "max"})
"""Operations on single numbers that torch does not mark as such."""


class RelativeBias:
    """Computes a relative position bias again for `count` more keys in front, at the positions before the first.

    Args:
        graph: the host.
        count: how many keys, or the node of this number.
        pad: makes a mask that is combined with such a bias wider: called with its node and its neutral value.
    """

    def __init__(self, graph: Graph, count: int | fx.Node, pad: Callable[[fx.Node, float], fx.Node]):
        self.graph, self.count, self.pad = graph, count, pad
        self._extended: dict[tuple[fx.Node, int], fx.Node] = {}

    def extended(self, node: fx.Node, axis: int) -> fx.Node:
        """A value with the further keys in front along an axis; the value itself where it does not depend on keys.

        Raises:
            ValueError: the value is computed by an operation that is not followed.
        """
        value, key = node.meta["val"], (node, axis)
        if key in self._extended:
            return self._extended[key]
        if axis < 0 or not isinstance(value, torch.Tensor) or value.shape[axis] == 1:
            return node
        target: Any = aten.arange.start if operation(node) == "arange" else node.target
        args = self._operands(node, axis)
        upstream = {node, *(a for a in args if isinstance(a, fx.Node))}
        last = [n for n in self.graph.nodes if n in upstream][-1]
        with self.graph.module.graph.inserting_after(last):
            copy = self.graph.module.graph.call_function(target, tuple(args), dict(node.kwargs))
        copy.meta = {k: v for k, v in node.meta.items() if k in PROVENANCE}
        with self.graph.fake_mode, torch.no_grad():
            copy.meta["val"] = evaluated(copy)
        self._extended[key] = copy
        return copy

    def _operands(self, node: fx.Node, axis: int) -> list[Any]:
        """The operands that compute a node's value with the further keys along an axis."""
        name = operation(node)
        args: list[Any] = list(node.args)
        rank = node.meta["val"].dim()
        if name == "embedding":
            return [args[0], self.extended(args[1], axis), *args[2:]]
        if name == "arange":
            start, end = (0, *args)[-2:]
            if not isinstance(start, int) or len(args) > 2:
                raise ValueError("its positions do not start at a number and rise by one")
            return [self._before(start, node), end]
        if name in POINTWISE or torch.Tag.pointwise in getattr(node.target, "tags", ()):
            return [self._term(node, i, a, axis) for i, a in enumerate(args)]
        inner = axis
        if name == "unsqueeze":
            inner -= int(args[1] % rank < axis)
        elif name == "permute":
            inner = args[1][axis]
        elif name not in PASSED and not (name == "slice" and keeps_shape(node)):
            raise ValueError(f"its bias comes through {name}, which is not followed")
        return [self.extended(args[0], inner), *args[1:]]

    def _before(self, start: int, node: fx.Node) -> int | fx.Node:
        """The number that is `count` before another."""
        if isinstance(self.count, int):
            return start - self.count
        with self.graph.module.graph.inserting_before(node):
            return self.graph.call(operator.sub, start, self.count, like=node)

    def _term(self, node: fx.Node, index: int, argument: object, axis: int) -> Any:
        """An operand of an operation on single numbers: extended where it depends on positions; a mask is padded."""
        if not isinstance(argument, fx.Node) or not isinstance(argument.meta.get("val"), torch.Tensor):
            return argument
        inner = axis - (node.meta["val"].dim() - argument.meta["val"].dim())
        if inner < 0 or argument.meta["val"].shape[inner] == 1:
            return argument
        positional = bias_table(argument) is not None or bias_table(node) is None
        if positional or inner != argument.meta["val"].dim() - 1:
            return self.extended(argument, inner)
        return self.pad(argument, float(operation(node) == "where" and index == 0))


def bias_table(node: fx.Node) -> fx.Node | None:
    """The lookup in a table that a bias comes from; None if it comes from none."""
    for source in numeric_ancestors(node):
        table = source.args[0] if operation(source) == "embedding" else None
        if isinstance(table, fx.Node) and is_weight(table):
            return source
    return None


def numeric_ancestors(node: fx.Node) -> list[fx.Node]:
    """A node and the nodes it is computed from, but not through booleans: those only say which keys are seen."""

    def numbers(nodes: Iterable[fx.Node]) -> list[fx.Node]:
        values = [(n, n.meta.get("val")) for n in nodes]
        return [n for n, value in values if isinstance(value, torch.Tensor) and value.dtype != torch.bool]

    return list(walk(numbers([node]), lambda n: numbers(n.all_input_nodes)))
