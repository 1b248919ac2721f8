"""Products of an input and a weight: how each is spelled, and what a second, thin matrix after it is multiplied by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx

from adaptc.ir.analysis.matmul import MATRIX_PRODUCTS, bias_of, operands_of
from adaptc.ir.nodes import operation

aten = torch.ops.aten
Emit = Callable[..., fx.Node]
"""Makes a node: `emit(target, *args)`."""
VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}


class Product(Protocol):
    """`y = E x + b` for a matrix E (out, in); `flipped` where E is stored (in, out)."""

    @property
    def drops(self) -> bool:
        """Whether dropout can go in front of x."""
        ...

    @property
    def after(self) -> Product | None:
        """What multiplies y by a further matrix; None where a product of two cannot be taken apart."""
        ...

    def multiply(self, emit: Emit, x: fx.Node, E: fx.Node, flipped: bool, bias: Any) -> fx.Node:
        """The product itself, spelled as the base spells it where the weight lies that way."""
        ...

    def along_out(self, emit: Emit, vector: fx.Node) -> fx.Node:
        """A vector (out,) shaped so that it multiplies, or is added to, y."""
        ...

    def along_in(self, emit: Emit, vector: fx.Node) -> fx.Node | None:
        """A vector (in,) shaped so that it multiplies x; None where columns are not features of x."""
        ...

    @property
    def features(self) -> int:
        """The axis of y that holds its features, counted from the end."""
        ...


def _flat(emit: Emit, vector: fx.Node) -> fx.Node:
    return vector if vector.meta["val"].dim() == 1 else emit(aten.reshape.default, vector, [-1])


@dataclass(frozen=True)
class Linear:
    """`linear(x, E, b)`, `x @ E + b`, `addmm(b, x, E)`."""

    drops: bool = True
    features: int = -1

    @property
    def after(self) -> Product:
        """Another one."""
        return self

    def multiply(self, emit: Emit, x: fx.Node, E: fx.Node, flipped: bool, bias: Any) -> fx.Node:
        """`linear` for (out, in), `addmm` or `matmul` for (in, out)."""
        if not flipped:
            return emit(aten.linear.default, x, E, *([] if bias is None else [bias]))
        if bias is not None and x.meta["val"].dim() == 2:
            return emit(aten.addmm.default, bias, x, E)
        y = emit(aten.matmul.default, x, E)
        return y if bias is None else emit(aten.add.Tensor, y, bias)

    def along_out(self, emit: Emit, vector: fx.Node) -> fx.Node:
        """Features are last."""
        return _flat(emit, vector)

    def along_in(self, emit: Emit, vector: fx.Node) -> fx.Node:
        """Features are last."""
        return _flat(emit, vector)


@dataclass(frozen=True)
class Embedding:
    """`embedding(E, ids)`: a product with one-hot rows, E stored (in, out)."""

    options: tuple[Any, ...]
    drops: bool = False
    features: int = -1

    @property
    def after(self) -> Product:
        """What was looked up is dense."""
        return Linear()

    def multiply(self, emit: Emit, x: fx.Node, E: fx.Node, flipped: bool, bias: Any) -> fx.Node:
        """A lookup of rows."""
        table = E if flipped else emit(aten.t.default, E)
        return emit(aten.embedding.default, table, x, *self.options)

    def along_out(self, emit: Emit, vector: fx.Node) -> fx.Node:
        """Features are last."""
        return _flat(emit, vector)

    def along_in(self, emit: Emit, vector: fx.Node) -> None:
        """Indices cannot be scaled."""
        return None


@dataclass(frozen=True)
class Convolution:
    """`conv(x, E, b)`, E's columns (in, *kernel) flattened."""

    target: Any
    kernel: tuple[int, ...]
    options: tuple[Any, ...]
    groups: int
    drops: bool = True

    @property
    def features(self) -> int:
        """Channels stand in front of the spatial axes."""
        return -len(self.kernel)

    @property
    def after(self) -> Product | None:
        """A convolution of one point; a grouped one's channels would be mixed."""
        if self.groups > 1:
            return None
        ones = (1,) * (len(self.kernel) - 1)
        plain = self.target.overloadpacket.default  # that of padding="same" takes no numbers
        return Convolution(plain, (0, *ones), ([*ones], [0] * len(ones), [*ones], 1), 1)

    def multiply(self, emit: Emit, x: fx.Node, E: fx.Node, flipped: bool, bias: Any) -> fx.Node:
        """The convolution with E's rows as kernels; E itself where it is kernels, or only a view of them."""
        if E.meta["val"].dim() > 2:
            return emit(self.target, x, E, bias, *self.options)
        if flipped:
            E = emit(aten.t.default, E)
        rows, columns = E.meta["val"].shape
        shape = [rows, self.kernel[0] or columns, *self.kernel[1:]]
        source = E.args[0] if E.target in VIEWS else None
        if isinstance(source, fx.Node) and list(source.meta["val"].shape) == shape:
            return emit(self.target, x, source, bias, *self.options)
        return emit(self.target, x, emit(aten.reshape.default, E, shape), bias, *self.options)

    def along_out(self, emit: Emit, vector: fx.Node) -> fx.Node:
        """Channels, then one for each spatial axis."""
        return emit(aten.reshape.default, vector, [-1, *(1 for _ in self.kernel[1:])])

    def along_in(self, emit: Emit, vector: fx.Node) -> fx.Node | None:
        """Columns are channels and places of the kernel: plain channels, if there is one place."""
        if self.groups > 1 or any(size != 1 for size in self.kernel[1:]):
            return None
        return self.along_out(emit, vector)


@dataclass(frozen=True)
class Operands:
    """A node as a product: x, its weight, its bias, and whether the weight is stored (in, out)."""

    product: Product
    x: fx.Node
    weight: fx.Node
    bias: Any
    flipped: bool


def operands(node: fx.Node) -> Operands | None:
    """Read a node as a product; None if it is of no kind that is taken apart."""
    if node.kwargs or operation(node) not in MATRIX_PRODUCTS or len(operands_of(node)) != 2:
        return None
    (x, weight), bias, options = operands_of(node), bias_of(node), node.args
    match operation(node):
        case "linear":
            return Operands(Linear(), x, weight, bias, flipped=False)
        case "addmm":
            return Operands(Linear(), x, weight, bias, flipped=True)
        case "mm" | "matmul" if isinstance(weight, fx.Node) and weight.meta["val"].dim() == 2:
            return Operands(Linear(), x, weight, None, flipped=True)
        case "embedding":
            return Operands(Embedding(tuple(options[2:])), x, weight, None, flipped=True)
        case "conv1d" | "conv2d" | "conv3d":
            kernel = tuple(weight.meta["val"].shape[1:])
            groups: Any = options[6] if len(options) > 6 else 1
            return Operands(
                Convolution(node.target, kernel, tuple(options[3:]), groups), x, weight, bias, flipped=False
            )
    return None
