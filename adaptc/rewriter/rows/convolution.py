"""Convolutions and lookups with a weight of each row's own, as products and lookups in stacks."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import fx

from adaptc.rewriter.rows.builder import Builder

aten = torch.ops.aten


class UnbatchedError(Exception):
    """An operation is not run with tensors of each row's own."""


def convolved(build: Builder, like: fx.Node, x: fx.Node, weight: fx.Node, options: Sequence[Any]) -> fx.Node:
    """A convolution of images with a kernel of each row's own: a product with the patches that it reads.

    Args:
        build: puts operations into the graph.
        like: the convolution.
        x: `(rows, in, height, width)`.
        weight: what each row gathers of a stack `(adapters, out, in, ...)` of kernels.
        options: stride, padding, dilation and groups, as far as they are stated.

    Raises:
        UnbatchedError: it has groups, or is of no image.
    """

    def call(target: Any, *args: Any) -> fx.Node:
        return build.call(target, *args, like=like)

    defaults: list[Any] = [[1, 1], [0, 0], [1, 1], 1]
    stride, padding, dilation, groups = [*options, *defaults[len(options) :]]
    if like.target is not aten.conv2d.default or groups != 1:
        raise UnbatchedError(
            "only convolutions of images without groups are run with kernels of each row's own"
        )
    stack, index = cast(fx.Node, weight.args[0]), weight.args[2]
    kernel = [int(size) for size in stack.meta["val"].shape[3:]]
    matrices = call(aten.index_select.default, call(aten.flatten.using_ints, stack, 2, -1), 0, index)
    stride, padding, dilation = (list(value) * (2 // len(value)) for value in (stride, padding, dilation))
    if math.prod(kernel) == 1 and stride == [1, 1] and padding == [0, 0]:
        patches = call(aten.flatten.using_ints, x, 2, -1)
    else:
        patches = call(aten.im2col.default, x, kernel, dilation, padding, stride)
    sizes: list[Any] = []
    for axis in (0, 1):
        size = call(aten.sym_size.int, x, 2 + axis)
        size = call(operator.add, size, 2 * padding[axis] - dilation[axis] * (kernel[axis] - 1) - 1)
        sizes.append(call(operator.add, call(cast(Any, operator).floordiv, size, stride[axis]), 1))
    outputs = int(stack.meta["val"].shape[1])
    return call(aten.view.default, call(aten.bmm.default, matrices, patches), [-1, outputs, *sizes])


def looked_up(
    build: Builder, like: fx.Node, weight: fx.Node, ids: fx.Node, options: Sequence[Any]
) -> fx.Node:
    """A lookup in a table of each row's own: in all tables, one below the other. No table is gathered.

    Args:
        build: puts operations into the graph.
        like: the lookup.
        weight: what each row would gather of a stack `(adapters, entries, features)`.
        ids: `(rows, ...)`.
        options: of torch's embedding; the entry of padding gets no gradient.
    """

    def call(target: Any, *args: Any) -> fx.Node:
        return build.call(target, *args, like=like)

    stack, index = cast(fx.Node, weight.args[0]), weight.args[2]
    entries, rank = int(stack.meta["val"].shape[1]), ids.meta["val"].dim()
    first = call(aten.view.default, call(aten.mul.Tensor, index, entries), [-1, *[1] * (rank - 1)])
    table = call(aten.flatten.using_ints, stack, 0, 1)
    looked_up = call(aten.embedding.default, table, call(aten.add.Tensor, ids, first))
    padding = options[0] if options else -1
    if padding < 0:
        return looked_up
    is_padding = call(aten.unsqueeze.default, call(aten.eq.Scalar, ids, padding), -1)
    return call(aten.where.self, is_padding, call(aten.detach.default, looked_up), looked_up)
