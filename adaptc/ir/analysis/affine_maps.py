"""Affine maps `y = E x + b`: how an operation reads as one, and how it is spelled with another matrix or input.

`matrix_products` says which operations multiply matrices. Linear layers, convolutions and embeddings among them can be
written again with another E, or as two maps where E is a product of two matrices: that is what this file is for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx

from adaptc.ir.analysis.matrix_products import MATRIX_PRODUCTS, bias_of, operands_of
from adaptc.ir.nodes import RESHAPES, operation

aten = torch.ops.aten
Emit = Callable[..., fx.Node]
"""Inserts an operation and gives its node: `emit(target, *args)`."""


class AffineMap(Protocol):
    """One way to compute `y = E x + b` for a matrix E (out, in), x with `in` features, and b (out,)."""

    @property
    def drops(self) -> bool:
        """Whether dropout can be applied to x: not to indices."""
        ...

    @property
    def after(self) -> AffineMap | None:
        """The map that multiplies y by a further matrix, for `E = E2 E1`; None if E cannot be split into two maps."""
        ...

    def multiply(self, emit: Emit, x: fx.Node, E: fx.Node, flipped: bool, bias: object) -> fx.Node:
        """Insert `E x + b`, spelled as the base spells it for a weight that is stored this way.

        Args:
            emit: inserts an operation.
            x: the input.
            E: the matrix.
            flipped: E is stored (in, out).
            bias: b.
        """
        ...

    def along_out(self, emit: Emit, vector: fx.Node) -> fx.Node:
        """A vector (out,) in a shape that multiplies y, or is added to y, feature by feature."""
        ...

    def along_in(self, emit: Emit, vector: fx.Node) -> fx.Node | None:
        """A vector (in,) in a shape that multiplies x feature by feature; None if E's columns are no features of x."""
        ...

    @property
    def features(self) -> int:
        """The axis of y that holds its features, counted from the end."""
        ...


def _flat(emit: Emit, vector: fx.Node) -> fx.Node:
    """The vector with one axis."""
    return vector if vector.meta["val"].dim() == 1 else emit(aten.reshape.default, vector, [-1])


@dataclass(frozen=True)
class Linear:
    """`linear(x, E, b)`, `x @ E + b`, `addmm(b, x, E)`."""

    drops: bool = True
    features: int = -1

    @property
    def after(self) -> AffineMap:
        """A linear map too: y has the shape of x."""
        return self

    def multiply(self, emit: Emit, x: fx.Node, E: fx.Node, flipped: bool, bias: object) -> fx.Node:
        """`linear` for E (out, in); `addmm` or `matmul` for E stored (in, out)."""
        if not flipped:
            return emit(aten.linear.default, x, E, *([] if bias is None else [bias]))
        if bias is not None and x.meta["val"].dim() == 2:
            return emit(aten.addmm.default, bias, x, E)
        y = emit(aten.matmul.default, x, E)
        return y if bias is None else emit(aten.add.Tensor, y, bias)

    def along_out(self, emit: Emit, vector: fx.Node) -> fx.Node:
        """The vector flat: the features of y are its last axis."""
        return _flat(emit, vector)

    def along_in(self, emit: Emit, vector: fx.Node) -> fx.Node:
        """The vector flat: the features of x are its last axis."""
        return _flat(emit, vector)


@dataclass(frozen=True)
class Embedding:
    """`embedding(E, ids)`: a product with one-hot rows, E stored (in, out)."""

    options: tuple[Any, ...]
    drops: bool = False
    features: int = -1

    @property
    def after(self) -> AffineMap:
        """A linear map: the rows that were looked up are dense."""
        return Linear()

    def multiply(self, emit: Emit, x: fx.Node, E: fx.Node, flipped: bool, bias: object) -> fx.Node:
        """A lookup of rows in the table E stored (in, out)."""
        table = E if flipped else emit(aten.t.default, E)
        return emit(aten.embedding.default, table, x, *self.options)

    def along_out(self, emit: Emit, vector: fx.Node) -> fx.Node:
        """The vector flat: the features of y are its last axis."""
        return _flat(emit, vector)

    def along_in(self, emit: Emit, vector: fx.Node) -> None:
        """None: x holds indices, which cannot be scaled."""
        return None


@dataclass(frozen=True)
class Convolution:
    """`conv(x, E, b)`, the columns of E being `(in, *kernel)` flattened.

    Attributes:
        target: the operation.
        kernel: (input channels of a group, *sizes of the kernel); 0 channels for as many as E has columns.
        options: its arguments from the fourth on: stride, padding, dilation, groups.
        groups: the number of groups.
        drops: see `AffineMap`.
    """

    target: Any
    kernel: tuple[int, ...]
    options: tuple[Any, ...]
    groups: int
    drops: bool = True

    @property
    def features(self) -> int:
        """Channels come before the spatial axes."""
        return -len(self.kernel)

    @property
    def after(self) -> AffineMap | None:
        """A convolution with a kernel of size 1; None for several groups, whose channels it would mix."""
        if self.groups > 1:
            return None
        ones = (1,) * (len(self.kernel) - 1)
        plain = self.target.overloadpacket.default  # that of padding="same" takes no numbers
        return Convolution(plain, (0, *ones), ([*ones], [0] * len(ones), [*ones], 1), 1)

    def multiply(self, emit: Emit, x: fx.Node, E: fx.Node, flipped: bool, bias: object) -> fx.Node:
        """The convolution with the rows of E as kernels; where E is kernels or a reshape of them, with those."""
        if E.meta["val"].dim() > 2:
            return emit(self.target, x, E, bias, *self.options)
        matrix = emit(aten.t.default, E) if flipped else E
        rows, columns = matrix.meta["val"].shape
        shape = [rows, self.kernel[0] or columns, *self.kernel[1:]]
        source = matrix.args[0] if operation(matrix) in RESHAPES else None
        if isinstance(source, fx.Node) and list(source.meta["val"].shape) == shape:
            return emit(self.target, x, source, bias, *self.options)
        return emit(self.target, x, emit(aten.reshape.default, matrix, shape), bias, *self.options)

    def along_out(self, emit: Emit, vector: fx.Node) -> fx.Node:
        """The vector as channels, with an axis of size 1 for each spatial axis."""
        return emit(aten.reshape.default, vector, [-1, *(1 for _ in self.kernel[1:])])

    def along_in(self, emit: Emit, vector: fx.Node) -> fx.Node | None:
        """The vector as channels if the kernel has size 1: else columns are channels at positions of the kernel."""
        if self.groups > 1 or any(size != 1 for size in self.kernel[1:]):
            return None
        return self.along_out(emit, vector)


@dataclass(frozen=True)
class Application:
    """A node read as `y = E x + b`.

    Attributes:
        affine: how it computes that.
        x: the input.
        weight: E.
        bias: b, a node or None.
        flipped: E is stored (in, out).
    """

    affine: AffineMap
    x: fx.Node
    weight: fx.Node
    bias: Any
    flipped: bool


def as_affine_map(node: fx.Node) -> Application | None:
    """Read a node as an affine map applied to an input; None if it is none that can be spelled with another matrix."""
    if node.kwargs or operation(node) not in MATRIX_PRODUCTS or len(operands_of(node)) != 2:
        return None
    (x, weight), bias, arguments = operands_of(node), bias_of(node), node.args
    match operation(node):
        case "linear":
            return Application(Linear(), x, weight, bias, flipped=False)
        case "addmm":
            return Application(Linear(), x, weight, bias, flipped=True)
        case "mm" | "matmul" if isinstance(weight, fx.Node) and weight.meta["val"].dim() == 2:
            return Application(Linear(), x, weight, None, flipped=True)
        case "embedding":
            return Application(Embedding(tuple(arguments[2:])), x, weight, None, flipped=True)
        case "conv1d" | "conv2d" | "conv3d":
            kernel = tuple(weight.meta["val"].shape[1:])
            groups: Any = arguments[6] if len(arguments) > 6 else 1
            convolution = Convolution(node.target, kernel, tuple(arguments[3:]), groups)
            return Application(convolution, x, weight, bias, flipped=False)
        case _:
            return None
