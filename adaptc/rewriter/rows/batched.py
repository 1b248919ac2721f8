"""Operations on activations with rows, and tensors of which each row has its own along the first axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from adaptc.ir.nodes import operation
from adaptc.rewriter.rows.builder import Builder
from adaptc.rewriter.rows.convolution import UnbatchedError, convolved, looked_up
from adaptc.rewriter.rows.row_axis import Rows

aten = torch.ops.aten


class Batched:
    """Runs operations whose tensors are each row's own.

    Args:
        build: puts operations into the graph.
        rows: where rows are in a value.

    Attributes:
        gathered: the nodes of such tensors, `(rows, *shape)`.
    """

    def __init__(self, build: Builder, rows: Rows):
        self.build, self.rows = build, rows
        self.gathered: set[fx.Node] = set()

    def call(self, like: fx.Node, args: Sequence[Any]) -> fx.Node:
        """An operation on these arguments, some of them each row's own.

        Args:
            like: a node of the operation.
            args: its arguments.

        Raises:
            UnbatchedError: it is not run so.
        """
        mine = [
            arg for arg in pytree.tree_leaves(list(args)) if isinstance(arg, fx.Node) and arg in self.gathered
        ]
        if not mine:
            return self.build.call(like.target, *args, like=like, named=like.kwargs)
        name = operation(like)
        if name in ("add", "mul", "sub", "div") and len(args) == 2 and not like.kwargs:
            return self.elementwise(like.target, args[0], args[1])
        if name == "linear":
            return self._linear(like, *args)
        if name == "einsum" and args[0].startswith("..."):
            return self._einsum(like, args[0], args[1])
        if name == "layer_norm":
            return self._layer_norm(like, *args)
        if name.startswith("conv") and args[0] not in self.gathered:
            return self._convolution(like, *args)
        if name == "embedding" and args[1] not in self.gathered:
            self._check_first(args[1])
            return looked_up(self.build, like, args[0], args[1], args[2:])
        raise UnbatchedError(f"{name} is not run with tensors of each row's own")

    def elementwise(self, target: Any, a: Any, b: Any) -> fx.Node:
        """An operation on single entries, of a value and a tensor that may be each row's own."""
        if a in self.gathered and b in self.gathered:
            raise UnbatchedError("both operands are each row's own")
        like, mine = (b, a) if a in self.gathered else (a, b)
        if mine in self.gathered:
            spread = self._spread(mine, like)
            a, b = (spread, b) if mine is a else (a, spread)
        return self.build.call(target, a, b, like=like)

    def _spread(self, mine: fx.Node, like: fx.Node) -> fx.Node:
        """A row's own tensor in a shape that broadcasts against a value."""
        axis, rank = self.rows.axis(like), like.meta["val"].dim()
        sizes = [int(size) for size in mine.meta["val"].shape[1:]]
        if axis is None or not axis.alone or axis.axis >= rank - len(sizes):
            raise UnbatchedError("the rows are not in front of it")
        shape = [1] * (rank - len(sizes)) + sizes
        shape[axis.axis] = -1
        return self.build.call(aten.view.default, mine, shape, like=like)

    def _linear(self, like: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None = None) -> fx.Node:
        """`x W^T + b`, W and b each row's own or shared."""
        if weight in self.gathered:
            result = self._product(like, x, weight)
        else:
            result = self.build.call(aten.linear.default, x, weight, like=like)
        return result if bias is None else self.elementwise(aten.add.Tensor, result, bias)

    def _product(self, like: fx.Node, x: fx.Node, weight: fx.Node) -> fx.Node:
        rank = x.meta["val"].dim()
        self._check_first(x)

        def call(target: Any, *args: Any) -> fx.Node:
            return self.build.call(target, *args, like=like)

        stack, index = weight.args[0], weight.args[2]  # turned before rows gather their own
        turned = call(aten.index_select.default, call(aten.transpose.int, stack, 1, 2), 0, index)
        if rank == 2:
            return call(
                aten.squeeze.dim, call(aten.bmm.default, call(aten.unsqueeze.default, x, 1), turned), 1
            )
        for _ in range(rank - 3):
            turned = call(aten.unsqueeze.default, turned, 1)
        return call(aten.matmul.default, x, turned)

    def _einsum(self, like: fx.Node, equation: str, operands: Sequence[fx.Node]) -> fx.Node:
        """A product with a letter more, for the rows."""
        terms, arrow, result = equation.replace(" ", "").partition("->")
        letter = next(chr(code) for code in range(ord("a"), ord("z") + 1) if chr(code) not in equation)
        if not arrow or not result.startswith("..."):
            raise UnbatchedError("its result has no rows in front")
        named: list[str] = []
        for term, operand in zip(terms.split(","), operands, strict=True):
            if operand not in self.gathered:
                self._check_first(operand)
            named.append(letter + term)
        return self.build.call(like.target, f"{','.join(named)}->{letter}{result}", list(operands), like=like)

    def _layer_norm(
        self, like: fx.Node, x: fx.Node, shape: Any, weight: Any = None, bias: Any = None, *rest: Any
    ) -> fx.Node:
        """A norm without its scale and shift, and these after it."""
        result = self.build.call(like.target, x, shape, None, None, *rest, like=like)
        result = result if weight is None else self.elementwise(aten.mul.Tensor, result, weight)
        return result if bias is None else self.elementwise(aten.add.Tensor, result, bias)

    def _convolution(
        self, like: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None = None, *options: Any
    ) -> fx.Node:
        """A convolution, its kernel and bias each row's own or shared."""
        self._check_first(x)
        if weight in self.gathered:
            result = convolved(self.build, like, x, weight, options)
        else:
            result = self.build.call(like.target, x, weight, None, *options, like=like)
        if bias is None:
            return result
        ranks = [1] * (x.meta["val"].dim() - 2)
        if bias not in self.gathered:
            bias = self.build.call(aten.view.default, bias, [-1, *ranks], like=like)
            return self.build.call(aten.add.Tensor, result, bias, like=like)
        stack, index = bias.args[0], bias.args[2]
        sizes = [int(size) for size in bias.meta["val"].shape[1:]]
        mine = self.build.call(aten.index_select.default, stack, 0, index, like=like)
        mine = self.build.call(aten.view.default, mine, [-1, *sizes, *ranks], like=like)
        return self.build.call(aten.add.Tensor, result, mine, like=like)

    def _check_first(self, x: fx.Node) -> None:
        axis = self.rows.axis(x)
        if axis is None or not axis.alone or axis.axis:
            raise UnbatchedError("the rows are not its first axis")
