"""Quantized weights: the few bits that stand for a weight, found when they are first asked for, then kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from adaptc.errors import WeightError
from adaptc.methods.site import WeightSite
from adaptc.quantization.packed import PackedMatrix, PackedWeight
from adaptc.quantization.scheme import Scheme, StoredTensor
from adaptc.weights import Weight


@dataclass(eq=False)
class Quantization:
    """One matrix of a weight in few bits.

    Attributes:
        scheme: how it is stored.
        site: whose weight it is; of a slice its rows only.
        source: the weight it stands for.
        inputs: gives the layer's inputs `(tokens, columns)`, where the scheme chooses by them.
        compensation_rounds: how often it is quantized, each time without what an adapter makes up for by then.
        compensation: what that is, of a matrix that has lost so much.
    """

    scheme: Scheme
    site: WeightSite
    source: Weight
    inputs: Callable[[], torch.Tensor | None] | None = None
    compensation_rounds: int = 1
    compensation: Callable[[torch.Tensor], torch.Tensor] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return matrix_size(self.site)

    @property
    def kept(self) -> PackedMatrix | None:
        """The base's own bits, where it is stored so already and nothing was folded into it."""
        known = self.source.bits if isinstance(self.source, PackedWeight) else None
        return known if known is not None and known.scheme == self.scheme and not self.site.rows else None

    @cached_property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """What is stored.

        Raises:
            WeightError: the weight holds NaN or infinity.
        """
        if self.kept is not None:
            return {name: self.kept.read(name) for name in self.kept.parts}
        W = self.matrix()
        if not torch.isfinite(W).all():
            raise WeightError(
                f"{self.site.name} holds NaN or infinity, which no {self.scheme.name} code stands for",
                "mend the checkpoint, or leave the layer out with `exclude`",
            )
        rows, columns = W.shape
        given = self.inputs() if self.inputs else None
        if given is not None and not torch.isfinite(given).all():
            raise WeightError(
                f"{self.site.name} is given NaN or infinity on the calibration rows",
                "a weight before it is broken: mend the checkpoint, or leave the layer out with `exclude`",
            )
        found = self.scheme.quantize(W, given)
        for _ in range(self.compensation_rounds - 1):
            assert self.compensation is not None
            compensation = self.compensation(W - self._unpacked(found))
            found = self.scheme.quantize(W - compensation, given)
        for name, kept in self.scheme.stored(rows, columns).items():
            got = found[name]
            if tuple(got.shape) != kept.shape or got.dtype != dtype_of(kept):
                raise ValueError(f"{self.scheme.name} gives {name} {got.dtype} {list(got.shape)}, not {kept}")
        return found

    def matrix(self) -> torch.Tensor:
        """The weight as the scheme sees it: `(rows, columns)`, float32."""
        with torch.no_grad():
            return matrix_of(self.site, self.source.exact()).float()

    def dequantized(self) -> torch.Tensor:
        """What the stored numbers stand for: `(rows, columns)`, float32."""
        return self._unpacked(self.tensors)

    def _unpacked(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            return self.scheme.unpack(*self.size, {**self.scheme.constants(), **tensors}, torch.float32)

    def lost(self) -> torch.Tensor:
        """What the weight was, less what the bits stand for: as the weight is stored."""
        rest = self.rest() if self.site.rows else None
        W = self.source.exact().float()
        return W - weight_of(self.site, self.dequantized(), None if rest is None else rest.float())

    def rest(self) -> torch.Tensor:
        """Of a slice, the other rows of the weight's matrix."""
        assert self.site.layout is not None
        W = self.site.layout.matrix(self.source.load())
        kept = torch.ones(W.shape[0], dtype=torch.bool)
        for start, stop in self.site.rows:
            kept[start:stop] = False
        return W[kept]


@dataclass(eq=False)
class QuantizedPart(Weight):
    """One of the tensors that stand for a weight."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]

    def load(self) -> torch.Tensor:
        """The tensor; made with the others when the first is asked for."""
        return self.make()


@dataclass(frozen=True)
class QuantizedLeaf:
    """A quantized weight in a graph.

    Attributes:
        quantization: the matrix in few bits.
        entry: of the spec's `quantize`; None where the base itself is stored so.
        tensors: argument of the scheme's `dequantize` -> name in the graph.
        matrix: the node that gives the matrix `(rows, columns)` in the weight's dtype.
        value: the node that gives the weight as it was stored.
        rest: of a slice, the name of the weight's other rows.
    """

    quantization: Quantization
    entry: int | None
    tensors: Mapping[str, str]
    matrix: str
    value: str
    rest: str = ""

    @property
    def scheme(self) -> Scheme:
        """How it is stored."""
        return self.quantization.scheme

    @property
    def site(self) -> WeightSite:
        """Whose weight it is."""
        return self.quantization.site


def matrix_size(site: WeightSite) -> tuple[int, int]:
    """Rows and columns of a site's matrix as schemes see it: an embedding's rows are its entries."""
    if site.kind == "embedding":
        return site.in_features, site.out_features
    return site.out_features * (site.batch or 1), site.in_features


def matrix_of(site: WeightSite, W: torch.Tensor) -> torch.Tensor:
    """A stored weight as one matrix; several matrices are stacked."""
    M = site.matrix(W)
    return M.t() if site.kind == "embedding" else M.reshape(-1, M.shape[-1])


def weight_of(site: WeightSite, M: torch.Tensor, rest: torch.Tensor | None = None) -> torch.Tensor:
    """The inverse: the weight as it is stored, with the rest of its rows where the matrix is a slice."""
    assert site.layout is not None
    if site.kind == "embedding":
        return site.layout.tensor(M.t(), site.shape)
    if site.batch is not None:
        M = M.reshape(site.batch, -1, M.shape[-1])
    if rest is None:
        return site.layout.tensor(M, site.shape)
    pieces, at, taken = [], 0, 0
    for start, stop in site.rows:
        before = start - at
        pieces += [rest[at - taken : at - taken + before], M[taken : taken + stop - start]]
        at, taken = stop, taken + stop - start
    pieces.append(rest[at - taken :])
    return site.layout.tensor(torch.cat([piece for piece in pieces if len(piece)]), site.shape)


def stored_as_matrix(site: WeightSite) -> bool:
    """Whether the matrix is the weight itself, not a transpose or another shape of it."""
    W = torch.empty(site.shape, device="meta")
    M = matrix_of(site, W)
    return not site.rows and M.shape == W.shape and M.stride() == W.stride()


def dtype_of(kept: StoredTensor) -> torch.dtype:
    """torch's own."""
    return getattr(torch, kept.dtype)


def part(quantization: Quantization, name: str, kept: StoredTensor) -> QuantizedPart:
    """One of a matrix's tensors as a weight; those of the base are read from its files whenever they are asked for."""
    bits = quantization.kept
    return QuantizedPart(
        kept.shape, dtype_of(kept), lambda: bits.read(name) if bits else quantization.tensors[name]
    )


def bytes_of(scheme: Scheme, rows: int, columns: int) -> int:
    """Bytes that a matrix takes, tables not counted."""
    kept = scheme.stored(rows, columns).values()
    return sum(torch.Size(k.shape).numel() * dtype_of(k).itemsize for k in kept)


def stored_bytes(known: Sequence[QuantizedLeaf]) -> int:
    """Bytes that all of these take."""
    return sum(bytes_of(q.scheme, *q.quantization.size) for q in known)
