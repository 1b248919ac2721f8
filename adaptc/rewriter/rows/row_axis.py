"""Where the rows of a batch are in a value."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from adaptc.errors import Refusal
from adaptc.ir.analysis.dataflow import VIEWS
from adaptc.ir.analysis.token_axes import MixesTokensError, TokenAxis, shape_of, viewed
from adaptc.ir.graph import Graph
from adaptc.ir.nodes import is_tensor, operation, size_expression

RowAxis = TokenAxis
"""The axis of a value along which the rows lie: `before * rows * after` entries, as for tokens."""


class Rows:
    """The axis of the rows in the values of a graph, read from their sizes.

    Args:
        size: the number of rows, as a formula: a symbol of its own.
    """

    def __init__(self, size: Any):
        self.size = size
        self._axes: dict[fx.Node, RowAxis | None] = {}

    def axis(self, node: fx.Node) -> RowAxis | None:
        """Where the rows are in a value; None if it is the same for all rows, or not told."""
        if node not in self._axes:
            self._axes[node] = self._read(node)
        return self._axes[node]

    def _read(self, node: fx.Node) -> RowAxis | None:
        if not is_tensor(node):
            return None
        shape = shape_of(node)
        axes = [axis for axis, size in enumerate(shape) if self.size in size.free_symbols]
        if len(axes) != 1:
            return None
        if shape[axes[0]] == self.size:
            return RowAxis(axes[0])
        return self._shared(node, axes[0], shape)

    def _shared(self, node: fx.Node, axis: int, shape: list[Any]) -> RowAxis | None:
        """The axis of rows that holds other things too, such as `(batch * tokens, features)`."""
        for operand in (n for n in node.all_input_nodes if is_tensor(n)):
            before = self.axis(operand)
            if before is None:
                continue
            if operation(node) in VIEWS and operation(node) not in ("transpose", "permute", "t", "expand"):
                try:
                    (after,) = viewed((before,), shape_of(operand), shape, self.size)
                    return after
                except MixesTokensError:
                    return None
            if not before.alone and shape_of(operand)[before.axis] == shape[axis]:
                return before.at(axis)
        return None


def rows_of(graph: Graph) -> Rows | Refusal:
    """The rows of a graph's batch: the first axis of its inputs.

    Returns:
        Them; or why a graph has none.
    """
    named = [s for s in graph.inputs if s.dims and isinstance(s.dims[0], str)]
    if not named:
        advice = "name it in `inputs`, such as int64[batch, seq], or in `dynamic`"
        return Refusal("no input has a first axis of any size, so that there are no rows", notes=(advice,))
    first = graph.placeholders[graph.inputs.index(named[0])]
    size = size_expression(first.meta["val"].shape[0])
    if not getattr(size, "is_Symbol", False):
        return Refusal(f"the number of rows of {named[0].name} is {size}, and must be any")
    return Rows(size)


def batch_size(graph: Graph) -> torch.SymInt:
    """The number of rows, as the size of the first input that has any number of them."""
    for spec, node in zip(graph.inputs, graph.placeholders, strict=True):
        if spec.dims and isinstance(spec.dims[0], str):
            return node.meta["val"].shape[0]
    raise AssertionError("rows_of refuses a graph without rows")
