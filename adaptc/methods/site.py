"""Sites: the places of a model that a method can adapt, as methods see them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MATRIX_KINDS = frozenset({"linear", "conv", "embedding", "experts"})
"""The kinds of site whose weight reads as matrices `(out, in)`; a method that needs no more can sit on all."""
WEIGHT_KINDS = MATRIX_KINDS | {"parameter"}
"""The kinds of site that are weights: `parameter` is any parameter of a module."""
DROPLESS = frozenset({"embedding", "experts"})
"""Kinds of site whose input dropout cannot go in front of: indices, and rows gathered for an expert."""
SUBLAYER, ATTENTION_POINT, INPUT = "sub-layer", "attention", "input"
POINTS = frozenset({SUBLAYER, ATTENTION_POINT, INPUT})
"""The kinds of site that are points: activations, no weights."""
KINDS = ("linear", "conv", "embedding", "experts", "parameter", SUBLAYER, ATTENTION_POINT, INPUT)
"""The kinds of site, as messages list them."""


@dataclass(frozen=True)
class Use:
    """One argument of one node: where a weight enters an operation."""

    node: str
    argument: int


@dataclass(frozen=True)
class Layout:
    """Which axes of a stored weight are what: `batch` of separate matrices, `out` of rows, `inner` of columns.

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
        """The inverse: matrices back to the stored shape."""
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
    """What all sites have: where they are in the model. See `WeightSite` and `point_sites`.

    Attributes:
        module: the full name of the module it belongs to.
        type: that module's class, such as `Linear`.
        kind: one of `KINDS`.
        op: the operation that reads the weight, or makes the point's value, such as `conv2d`.
        dtype: the stored dtype of the weight, or that of the point's value.
        uses: where the weight, or what is adapted at the point, enters operations.
        source: file and line of the model that runs this operation.
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
        """The first node that is adapted here, or reads what is."""
        return self.uses[0].node

    @property
    def batch(self) -> int | None:
        """How many matrices the weight holds, such as one an expert; None where it is one matrix, or no weight."""
        return None

    @property
    def name(self) -> str:
        """The full name of the module, or of the weight in its own module."""
        return self.module

    @property
    def part(self) -> str:
        """A suffix that tells this site's tensors from those of others in the same module; "" where it needs none."""
        return ""

    @property
    def pattern(self) -> str:
        """The target that means this site alone."""
        return self.module

    def key(self, key: str) -> str:
        """The key of a tensor of this site in adaptc's own checkpoints: the module's name, if it has one, and `key`."""
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
        shared: the module has several matrices, so that the leaf tells them apart.
        piece: of a slice its name, such as `q` or `0:512`; empty for the whole.
        rows: the ranges of rows of the matrix that a slice is made of.
        groups: of a grouped convolution.
        computed_bias: the bias beside it is no parameter, but computed from some.
        foreign: where another module reads the weight in another way.
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

    @property
    def out_features(self) -> int:
        """Rows of a matrix `(out, in)`."""
        if self.rows:
            return sum(stop - start for start, stop in self.rows)
        return self._size(self.layout.out) if self.layout else self.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of a matrix `(out, in)`."""
        return self._size(self.layout.inner) if self.layout else self.shape[-1]

    @property
    def batch(self) -> int | None:
        """How many matrices the weight holds, such as one an expert; None where it is one matrix."""
        return self._size(self.layout.batch) if self.layout and self.layout.batch else None

    @property
    def inner_shape(self) -> tuple[int, ...]:
        """The stored axes that columns are made of: `(in, height, width)` of a convolution."""
        assert self.layout is not None
        return tuple(self.shape[axis] for axis in self.layout.inner)

    @property
    def transposed(self) -> bool:
        """Whether a linear weight is stored `(in, out)`, as GPT-2's Conv1D does."""
        return self.kind == "linear" and self.layout is not None and self.layout.out == (1,)

    @property
    def layer(self) -> str:
        """The class of torch's or transformers' layer that does this: `Linear`, `Conv2d`; "" where there is none."""
        if self.kind == "linear":
            return "Conv1D" if self.transposed else "Linear"
        if self.kind == "conv":
            return "Conv" + self.op.removeprefix("conv").replace("_transpose", "Transpose")
        return {"embedding": "Embedding"}.get(self.kind, "")

    def as_parameter(self) -> WeightSite:
        """The same weight as a parameter, wherever it is used."""
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
        """Whether the weight is targeted by its own name: PEFT's `target_parameters`."""
        return self.kind in MATRIX_KINDS and self.leaf not in ("weight", IN_PROJECTION)

    @property
    def rows_repeat(self) -> bool:
        """Whether a row makes several channels, as in every group of a grouped transposed convolution."""
        return self.groups > 1 and "transpose" in self.op

    @property
    def name(self) -> str:
        """The weight's full name in its own module."""
        return ".".join(part for part in (self.module, self.leaf) if part)

    def _size(self, axes: Sequence[int]) -> int:
        return math.prod(self.shape[axis] for axis in axes)

    @property
    def part(self) -> str:
        """What tells this site's tensors from those of others in the same module."""
        words = (self.leaf if self.shared else "", re.sub("[:,]", "_", self.piece))
        return "_".join(word for word in words if word)

    @property
    def pattern(self) -> str:
        """The target that means this site alone."""
        name = ".".join(p for p in (self.module, self.leaf if self.shared else "") if p)
        return name + (f"[{self.piece}]" if self.piece else "")

    def matrix(self, W: Tensor) -> Tensor:
        """The weight as the method sees it: `(out, in)`, or `(batch, out, in)`; a slice has its own rows only."""
        M = self.layout.matrix(W) if self.layout else W
        return self._take(M, -2) if self.rows else M

    def restored(self, M: Tensor, W: Tensor) -> Tensor:
        """The stored weight with `M` in place of what `matrix` gave."""
        if self.layout is None:
            return M
        whole = self._put(M, self.layout.matrix(W), -2) if self.rows else M
        return self.layout.tensor(whole, self.shape)

    def bias_of(self, b: Tensor) -> Tensor:
        """The bias as the method sees it: `(out,)` of this site's rows."""
        return self._take(b, -1) if self.rows else b

    def bias_restored(self, new: Tensor, b: Tensor) -> Tensor:
        """The whole bias with `new` in place of what `bias_of` gave."""
        return self._put(new, b, -1) if self.rows else new

    def _take(self, whole: Tensor, axis: int) -> Tensor:
        return _joined([whole.narrow(axis, start, stop - start) for start, stop in self.rows], axis)

    def _put(self, new: Tensor, whole: Tensor, axis: int) -> Tensor:
        pieces: list[Tensor] = []
        at = taken = 0
        for start, stop in self.rows:
            if start > at:
                pieces.append(whole.narrow(axis, at, start - at))
            pieces.append(new.narrow(axis, taken, stop - start) if len(self.rows) > 1 else new)
            at, taken = stop, taken + stop - start
        if at < whole.shape[axis]:
            pieces.append(whole.narrow(axis, at, whole.shape[axis] - at))
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
"""torch's attention module, whose output projection is no layer of its own: both are adapted together by PEFT."""
IN_PROJECTION = "in_proj_weight"
"""The weight of query, key and value in that module: PEFT means it by the module's name."""
