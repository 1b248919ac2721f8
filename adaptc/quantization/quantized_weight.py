"""Quantized weights: quantized when one of their tensors is first loaded, then kept in memory."""

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
    """One quantized matrix of a weight.

    Attributes:
        scheme: how it is stored.
        site: the site of the weight; of a slice its rows only.
        source: the weight before quantizing.
        inputs: gives the layer's inputs `(tokens, columns)`, where the scheme is calibrated.
        compensation_rounds: how often it is quantized; from the second time on, less what an adapter compensates.
        compensation: gives what the adapter compensates of a residual `W - dequantized` (rows, columns).
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
    def packed(self) -> PackedMatrix | None:
        """The base's own packed matrix, where the base stores it by this scheme and nothing was folded into it."""
        matrix = self.source.matrix if isinstance(self.source, PackedWeight) else None
        return matrix if matrix is not None and matrix.scheme == self.scheme and not self.site.rows else None

    @cached_property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """What the scheme stores of the matrix: argument of its `dequantize` -> tensor.

        Raises:
            WeightError: the weight, or the layer's inputs, are not finite.
        """
        if self.packed is not None:
            return {name: self.packed.read(name) for name in self.packed.parts}
        W = self.matrix()
        if not torch.isfinite(W).all():
            raise WeightError(
                f"{self.site.name} contains NaN or infinity (non-finite), which {self.scheme.name} cannot store",
                "load an intact checkpoint, or leave the layer out with `exclude`",
            )
        rows, columns = W.shape
        inputs = self.inputs() if self.inputs else None
        if inputs is not None and not torch.isfinite(inputs).all():
            raise WeightError(
                f"the inputs of {self.site.name} contain NaN or infinity (non-finite) on the calibration rows",
                "a weight upstream is broken: load an intact checkpoint, or leave the layer out with `exclude`",
            )
        tensors = self.scheme.quantize(W, inputs)
        for _ in range(self.compensation_rounds - 1):
            assert self.compensation is not None
            compensation = self.compensation(W - self._dequantized(tensors))
            tensors = self.scheme.quantize(W - compensation, inputs)
        for name, stored in self.scheme.stored(rows, columns).items():
            got = tensors[name]
            if tuple(got.shape) != stored.shape or got.dtype != dtype_of(stored):
                raise ValueError(
                    f"{self.scheme.name} gives {name} {got.dtype} {list(got.shape)}, not {stored}"
                )
        return tensors

    def matrix(self) -> torch.Tensor:
        """The weight as the scheme sees it: `(rows, columns)`, float32."""
        with torch.no_grad():
            return matrix_of(self.site, self.source.exact()).float()

    def dequantized(self) -> torch.Tensor:
        """The dequantized matrix `(rows, columns)`, float32."""
        return self._dequantized(self.tensors)

    def _dequantized(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            return self.scheme.unpack(*self.size, {**self.scheme.constants(), **tensors}, torch.float32)

    def residual(self) -> torch.Tensor:
        """`W - dequantized`, in the weight's own shape, float32: what quantizing has lost."""
        rest = self.rest() if self.site.rows else None
        W = self.source.exact().float()
        return W - weight_of(self.site, self.dequantized(), None if rest is None else rest.float())

    def rest(self) -> torch.Tensor:
        """Of a slice, the other rows of the weight's matrix, in the weight's dtype."""
        assert self.site.layout is not None
        W = self.site.layout.matrix(self.source.load())
        other = torch.ones(W.shape[0], dtype=torch.bool)
        for start, stop in self.site.rows:
            other[start:stop] = False
        return W[other]


@dataclass(eq=False)
class QuantizedPart(Weight):
    """One of the tensors that a quantized weight is stored in."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]

    def load(self) -> torch.Tensor:
        """The tensor; the first one asked for quantizes the weight, which gives all."""
        return self.make()


@dataclass(frozen=True)
class QuantizedLeaf:
    """A quantized weight in a graph.

    Attributes:
        quantization: the quantized matrix.
        entry: the entry of the spec's `quantize`; None where the base itself is stored so.
        tensors: argument of the scheme's `dequantize` -> name in the graph.
        matrix: the node that gives the matrix `(rows, columns)` in the weight's dtype.
        value: the node that gives the weight in its own shape.
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
        """The scheme that stores it."""
        return self.quantization.scheme

    @property
    def site(self) -> WeightSite:
        """The site of the weight; of a slice its rows only."""
        return self.quantization.site


def matrix_size(site: WeightSite) -> tuple[int, int]:
    """The rows and columns of a site's matrix as schemes see it: an embedding's rows are its entries."""
    if site.kind == "embedding":
        return site.in_features, site.out_features
    return site.out_features * (site.batch or 1), site.in_features


def matrix_of(site: WeightSite, W: torch.Tensor) -> torch.Tensor:
    """A weight as one matrix of the size that `matrix_size` gives; several matrices are stacked."""
    M = site.matrix(W)
    return M.t() if site.kind == "embedding" else M.reshape(-1, M.shape[-1])


def weight_of(site: WeightSite, M: torch.Tensor, rest: torch.Tensor | None = None) -> torch.Tensor:
    """A weight from its matrix, as `matrix_of` takes it from a weight.

    Args:
        site: the site of the weight.
        M: the matrix; of a slice its rows only.
        rest: of a slice, the other rows of the weight's matrix.
    """
    assert site.layout is not None
    if site.kind == "embedding":
        return site.layout.tensor(M.t(), site.shape)
    matrices = M if site.batch is None else M.reshape(site.batch, -1, M.shape[-1])
    if rest is None:
        return site.layout.tensor(matrices, site.shape)
    pieces: list[torch.Tensor] = []
    at, taken = 0, 0
    for start, stop in site.rows:
        before = start - at
        pieces += [rest[at - taken : at - taken + before], matrices[taken : taken + stop - start]]
        at, taken = stop, taken + stop - start
    pieces.append(rest[at - taken :])
    return site.layout.tensor(torch.cat([piece for piece in pieces if len(piece)]), site.shape)


def stored_as_matrix(site: WeightSite) -> bool:
    """Whether the matrix is the weight itself, not a transpose or another shape of it."""
    W = torch.empty(site.shape, device="meta")
    M = matrix_of(site, W)
    return not site.rows and M.shape == W.shape and M.stride() == W.stride()


def dtype_of(stored: StoredTensor) -> torch.dtype:
    """torch's dtype of a stored tensor, which names it."""
    return getattr(torch, stored.dtype)


def part(quantization: Quantization, name: str, stored: StoredTensor) -> QuantizedPart:
    """One of a matrix's tensors as a weight; a packed one of the base is read from its file each time it is loaded."""
    packed = quantization.packed
    return QuantizedPart(
        stored.shape, dtype_of(stored), lambda: packed.read(name) if packed else quantization.tensors[name]
    )


def bytes_of(scheme: Scheme, rows: int, columns: int) -> int:
    """The bytes that a scheme stores a matrix in, without constants that all matrices share, such as a table."""
    stored = scheme.stored(rows, columns).values()
    return sum(torch.Size(tensor.shape).numel() * dtype_of(tensor).itemsize for tensor in stored)


def stored_bytes(leaves: Sequence[QuantizedLeaf]) -> int:
    """The bytes that quantized weights are stored in, without constants that all matrices share."""
    return sum(bytes_of(leaf.scheme, *leaf.quantization.size) for leaf in leaves)
