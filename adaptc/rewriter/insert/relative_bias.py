"""Biases that are looked up by the distance of a query and a key, such as T5's."""

from __future__ import annotations

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


class Distances:
    """The same computation for keys that start `count` places earlier.

    Args:
        graph: the host.
        count: how many places.
        pad: makes a mask beside such a bias wider; given what it is where it changes nothing.
    """

    def __init__(self, graph: Graph, count: int, pad: Callable[[fx.Node, float], fx.Node]):
        self.graph, self.count, self.pad = graph, count, pad
        self._longer: dict[tuple[fx.Node, int], fx.Node] = {}

    def longer(self, node: fx.Node, axis: int) -> fx.Node:
        """A value whose keys along an axis start earlier; itself where it does not depend on them.

        Raises:
            ValueError: it comes through an operation that is not followed.
        """
        value, key = node.meta["val"], (node, axis)
        if key in self._longer:
            return self._longer[key]
        if axis < 0 or not isinstance(value, torch.Tensor) or value.shape[axis] == 1:
            return node
        target: Any = aten.arange.start if operation(node) == "arange" else node.target
        args = self._operands(node, axis)
        after = {node, *(a for a in args if isinstance(a, fx.Node))}
        last = [n for n in self.graph.nodes if n in after][-1]
        with self.graph.module.graph.inserting_after(last):
            made = self.graph.module.graph.call_function(target, tuple(args), dict(node.kwargs))
        made.meta = {k: v for k, v in node.meta.items() if k in PROVENANCE}
        with self.graph.fake_mode, torch.no_grad():
            made.meta["val"] = evaluated(made)
        self._longer[key] = made
        return made

    def _operands(self, node: fx.Node, axis: int) -> list[Any]:
        name, args = operation(node), list(node.args)
        rank = node.meta["val"].dim()
        if name == "embedding":
            return [args[0], self.longer(args[1], axis), *args[2:]]  # type: ignore[arg-type]
        if name == "arange":
            start, end = (0, *args)[-2:]
            if not isinstance(start, int) or len(args) > 2:
                raise ValueError("its positions do not start at a number and rise by one")
            return [start - self.count, end]
        if name in POINTWISE or torch.Tag.pointwise in getattr(node.target, "tags", ()):
            return [self._term(node, i, a, axis) for i, a in enumerate(args)]
        inner: Any = axis
        if name == "unsqueeze":
            inner -= int(args[1] % rank < axis)  # type: ignore[operator]
        elif name == "permute":
            inner = args[1][axis]  # type: ignore[index]
        elif name not in PASSED and not (name == "slice" and keeps_shape(node)):
            raise ValueError(f"its bias comes through {name}, which is not followed")
        return [self.longer(args[0], inner), *args[1:]]  # type: ignore[arg-type]

    def _term(self, node: fx.Node, index: int, argument: Any, axis: int) -> Any:
        """An operand: what knows positions starts earlier, a mask beside it is padded."""
        if not isinstance(argument, fx.Node) or not isinstance(argument.meta.get("val"), torch.Tensor):
            return argument
        inner = axis - (node.meta["val"].dim() - argument.meta["val"].dim())
        if inner < 0 or argument.meta["val"].shape[inner] == 1:
            return argument
        counted = table_behind(argument) is not None or table_behind(node) is None
        if counted or inner != argument.meta["val"].dim() - 1:
            return self.longer(argument, inner)
        return self.pad(argument, float(operation(node) == "where" and index == 0))


def table_behind(node: fx.Node) -> fx.Node | None:
    """The table that a bias is looked up in, if it is."""
    for found in numbers_behind(node):
        if operation(found) == "embedding" and is_weight(found.args[0]):  # type: ignore[arg-type]
            return found
    return None


def numbers_behind(node: fx.Node) -> list[fx.Node]:
    """What a value is made from as numbers: behind a comparison they only say what is seen."""

    def numbers(nodes: Iterable[fx.Node]) -> list[fx.Node]:
        values = [(n, n.meta.get("val")) for n in nodes]
        return [n for n, value in values if isinstance(value, torch.Tensor) and value.dtype != torch.bool]

    return list(walk(numbers([node]), lambda n: numbers(n.all_input_nodes)))
