"""Sites: what a method can adapt in a model, as methods see it. Weights are here, points in `point_sites`."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from adaptc.patterns import literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MATRIX_KINDS = frozenset({"linear", "conv", "embedding", "experts"})
"""The kinds of site whose weight is one or several matrices `(out, in)`."""
WEIGHT_KINDS = MATRIX_KINDS | {"parameter"}
"""The kinds of site that are weights: `parameter` is any parameter of a module."""
DROPLESS = frozenset({"embedding", "experts"})
"""Kinds of site whose input dropout cannot act on: indices, and rows gathered for an expert."""
SUBLAYER, ATTENTION_POINT, INPUT, HEAD = "sub-layer", "attention", "input", "head"
POINTS = frozenset({SUBLAYER, ATTENTION_POINT, INPUT, HEAD})
"""The kinds of site that are points, not weights."""
KINDS = ("linear", "conv", "embedding", "experts", "parameter", SUBLAYER, ATTENTION_POINT, INPUT, HEAD)
"""The kinds of site, as messages list them."""


@dataclass(frozen=True)
class Use:
    """One argument of one node: where a weight enters an operation."""

    node: str
    argument: int


@dataclass(frozen=True)
class Layout:
    """Which axes of a stored weight are separate matrices (`batch`), rows (`out`) and columns (`inner`).

    A linear weight is out (0,), inner (1,); GPT-2's Conv1D out (1,), inner (0,); a convolution's out (0,), inner
    (1, 2, 3); an embedding's out (1,), inner (0,): it multiplies one-hot rows; fused experts' batch (0,), out (1,),
    inner (2,).
    """

    out: tuple[int, ...]
    inner: tuple[int, ...]
    batch: tuple[int, ...] = ()

    def matrix(self, W: Tensor) -> Tensor:
        """The stored weight as `(out, in)`, or `(batch, out, in)`."""
        order = (*self.batch, *self.out, *self.inner)
        if order == (1, 0):
            return W.t()
        shape = [math.prod(W.shape[axis] for axis in axes) for axes in (self.out, self.inner)]
        if self.batch:
            shape.insert(0, math.prod(W.shape[axis] for axis in self.batch))
        moved = W if order == tuple(range(W.dim())) else W.permute(order)
        return moved if list(moved.shape) == shape else moved.reshape(shape)

    def tensor(self, M: Tensor, shape: Sequence[int]) -> Tensor:
        """Matrices `(out, in)` or `(batch, out, in)` in the stored shape: the inverse of `matrix`."""
        order = (*self.batch, *self.out, *self.inner)
        if order == (1, 0):
            return M.t()
        moved = [shape[axis] for axis in order]
        whole = M if list(M.shape) == moved else M.reshape(moved)
        return (
            whole
            if order == tuple(range(len(order)))
            else whole.permute([order.index(i) for i in range(len(order))])
        )


@dataclass(frozen=True)
class Place:
    """What all sites have: where they are in the model.

    Attributes:
        module: the full name of the module it belongs to.
        type: that module's class, such as `Linear`.
        kind: one of `KINDS`.
        op: the operation that reads the weight or computes the point's value, such as `conv2d`.
        dtype: the dtype of the stored weight or of the point's value.
        uses: where the weight, or the value adapted at the point, enters operations.
        source: file and line of the model's code that runs this operation.
    """

    module: str
    type: str
    kind: str
    op: str
    dtype: torch.dtype
    uses: tuple[Use, ...]
    source: str

    @property
    def node(self) -> str:
        """The first node that reads the adapted weight or value."""
        return self.uses[0].node

    @property
    def batch(self) -> int | None:
        """How many matrices the weight holds, one for each fused expert; None for one matrix, and for a point."""
        return None

    @property
    def name(self) -> str:
        """The full name of the module, or of the weight in its own module."""
        return self.module

    @property
    def part(self) -> str:
        """A suffix for keys where several sites of one module have tensors; "" where it needs none."""
        return ""

    @property
    def pattern(self) -> str:
        """The target that means this site alone."""
        return literal(self.module)

    def key(self, key: str) -> str:
        """The key of a tensor of this site in adaptc's own checkpoints: `module.key`, with `part` in the first word."""
        first, dot, rest = key.partition(".")
        named = f"{first}_{self.part}{dot}{rest}" if self.part else key
        return f"{self.module}.{named}" if self.module else named

    def __str__(self) -> str:
        return f"{self.pattern} ({self.kind} {self._sides()})" + (
            f", from {self.source}" if self.source else ""
        )

    def _sides(self) -> str:
        """The sizes as messages show them."""
        raise NotImplementedError


@dataclass(frozen=True)
class WeightSite(Place):
    """A weight, or rows of one: what a weight method adapts.

    Attributes:
        parameter: the weight's name in the graph.
        leaf: the weight's name inside its module, such as `weight`.
        shape: the stored shape.
        layout: how the stored weight reads as matrices; None for a `parameter`.
        bias: the name of the bias beside it, if any.
        bias_uses: where the bias enters.
        shared: whether the module has several matrices, so that names need the leaf.
        piece: the name of a slice, such as `q` or `0:512`; "" for the whole weight.
        rows: the ranges of rows of the matrix that a slice consists of; empty for the whole weight.
        groups: the number of groups of a convolution.
        computed_bias: whether the bias beside it is computed from parameters instead of being one.
        foreign: where another module reads the weight in another way.
        named: whether the target is the weight itself rather than its layer, as in PEFT's `target_parameters`.
    """

    parameter: str
    leaf: str
    shape: tuple[int, ...]
    layout: Layout | None
    bias: str | None = None
    bias_uses: tuple[Use, ...] = ()
    shared: bool = False
    piece: str = ""
    rows: tuple[tuple[int, int], ...] = ()
    groups: int = 1
    computed_bias: bool = False
    foreign: tuple[Use, ...] = ()
    named: bool = False

    @property
    def out_features(self) -> int:
        """The number of rows of a matrix `(out, in)`; of a slice, its rows alone."""
        if self.rows:
            return sum(stop - start for start, stop in self.rows)
        return self._size(self.layout.out) if self.layout else self.shape[0]

    @property
    def in_features(self) -> int:
        """The number of columns of a matrix `(out, in)`."""
        return self._size(self.layout.inner) if self.layout else self.shape[-1]

    @property
    def batch(self) -> int | None:
        """How many matrices the weight holds, one for each fused expert; None where it is one matrix."""
        return self._size(self.layout.batch) if self.layout and self.layout.batch else None

    @property
    def inner_shape(self) -> tuple[int, ...]:
        """The sizes of the stored axes that are columns: `(in, height, width)` of a convolution."""
        assert self.layout is not None
        return tuple(self.shape[axis] for axis in self.layout.inner)

    @property
    def transposed(self) -> bool:
        """Whether a linear weight is stored `(in, out)`, as GPT-2's Conv1D does."""
        return self.kind == "linear" and self.layout is not None and self.layout.out == (1,)

    @property
    def layer(self) -> str:
        """The layer class of torch or transformers that computes this, such as `Linear`; "" where there is none."""
        if self.kind == "linear":
            return "Conv1D" if self.transposed else "Linear"
        if self.kind == "conv":
            return "Conv" + self.op.removeprefix("conv").replace("_transpose", "Transpose")
        return {"embedding": "Embedding"}.get(self.kind, "")

    def as_parameter(self) -> WeightSite:
        """The site of this weight as a `parameter`: whole, at all its uses."""
        return replace(
            self,
            uses=(*self.uses, *self.foreign),
            kind="parameter",
            layout=None,
            bias=None,
            bias_uses=(),
            shared=False,
            foreign=(),
        )

    @property
    def by_parameter(self) -> bool:
        """Whether PEFT targets the weight by its own name (`target_parameters`): it is not its layer's main one."""
        return self.kind in MATRIX_KINDS and (self.named or self.leaf not in ("weight", IN_PROJECTION))

    @property
    def rows_repeat(self) -> bool:
        """Whether a row makes several output channels, as in a grouped transposed convolution."""
        return self.groups > 1 and "transpose" in self.op

    @property
    def name(self) -> str:
        """The weight's full name in its own module."""
        return ".".join(part for part in (self.module, self.leaf) if part)

    def _size(self, axes: Sequence[int]) -> int:
        return math.prod(self.shape[axis] for axis in axes)

    @property
    def part(self) -> str:
        """A suffix for keys where several sites of one module have tensors: the leaf, the slice, or both."""
        parts = (self.leaf if self.shared else "", re.sub("[:,]", "_", self.piece))
        return "_".join(part for part in parts if part)

    @property
    def pattern(self) -> str:
        """The target that means this site alone."""
        named = self.shared or not self.module or self.kind not in MATRIX_KINDS
        return literal(self.name if named else self.module) + (f"[{self.piece}]" if self.piece else "")

    def matrix(self, W: Tensor) -> Tensor:
        """The weight as the method sees it: `(out, in)`, or `(batch, out, in)`; the rows of a slice alone."""
        M = self.layout.matrix(W) if self.layout else W
        return self._take(M, -2) if self.rows else M

    def restored(self, M: Tensor, W: Tensor) -> Tensor:
        """The stored weight W with M in place of `matrix(W)`."""
        if self.layout is None:
            return M
        whole = self._put(M, self.layout.matrix(W), -2) if self.rows else M
        return self.layout.tensor(whole, self.shape)

    def bias_of(self, b: Tensor) -> Tensor:
        """The bias as the method sees it: `(out,)`, of the rows of this site."""
        return self._take(b, -1) if self.rows else b

    def bias_restored(self, new: Tensor, b: Tensor) -> Tensor:
        """The whole bias b with `new` in place of `bias_of(b)`."""
        return self._put(new, b, -1) if self.rows else new

    def _take(self, whole: Tensor, axis: int) -> Tensor:
        return _joined([whole.narrow(axis, start, stop - start) for start, stop in self.rows], axis)

    def _put(self, new: Tensor, whole: Tensor, axis: int) -> Tensor:
        pieces: list[Tensor] = []
        end = offset = 0
        for start, stop in self.rows:
            if start > end:
                pieces.append(whole.narrow(axis, end, start - end))
            pieces.append(new.narrow(axis, offset, stop - start) if len(self.rows) > 1 else new)
            end, offset = stop, offset + stop - start
        if end < whole.shape[axis]:
            pieces.append(whole.narrow(axis, end, whole.shape[axis] - end))
        return _joined(pieces, axis)

    def _sides(self) -> str:
        if self.kind not in MATRIX_KINDS:
            return str(list(self.shape))
        return f"{self.in_features} -> {self.out_features}" + (f" x {self.batch}" if self.batch else "")


def _joined(pieces: Sequence[Tensor], axis: int) -> Tensor:
    if len(pieces) == 1:
        return pieces[0]
    import torch

    return torch.cat(list(pieces), axis)


ATTENTION, OUT_PROJECTION = "MultiheadAttention", ".out_proj"
"""torch's attention module, and its output projection, which PEFT adapts together with it."""
IN_PROJECTION = "in_proj_weight"
"""The fused weight of query, key and value in that module; PEFT targets it by the module's name."""
