"""Packed weights: those of a checkpoint that another library has quantized, kept in its codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from adaptc.errors import WeightError
from adaptc.quantization.scheme import Scheme
from adaptc.weights import Weight

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class PackedMatrix:
    """A matrix `(rows, columns)` as a checkpoint stores it, laid out as one of our schemes stores it.

    Attributes:
        scheme: the scheme that dequantizes it.
        rows: outputs of the layer.
        columns: inputs of the layer.
        parts: argument of the scheme's `dequantize` -> a function that reads the tensor.
        name: the module it belongs to, for messages.
    """

    scheme: Scheme
    rows: int
    columns: int
    parts: Mapping[str, Callable[[], Tensor]]
    name: str

    def read(self, key: str) -> Tensor:
        """The tensor for one argument of the scheme's `dequantize`.

        Raises:
            WeightError: it is not finite.
        """
        tensor = self.parts[key]()
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise WeightError(
                f"{self.name}: its {key} contain NaN or infinity (non-finite)", "load an intact checkpoint"
            )
        return tensor

    def with_part(self, key: str, read: Callable[[], Tensor]) -> PackedMatrix:
        """A copy that has one more tensor."""
        return replace(self, parts={**self.parts, key: read})


@dataclass(frozen=True, eq=False)
class PackedWeight(Weight):
    """A weight that a checkpoint stores quantized. Loading it dequantizes it; as a quantized leaf it stays packed.

    Attributes:
        matrix: the packed matrix `(out, in)`.
        shape: of the weight, as the model has it.
        dtype: of the weight.
        flipped: the model stores the transpose, `(in, out)`.
    """

    matrix: PackedMatrix
    shape: tuple[int, ...]
    dtype: torch.dtype
    flipped: bool

    def load(self) -> Tensor:
        """The dequantized weight, in the weight's dtype."""
        return self.exact().to(self.dtype)

    def exact(self) -> Tensor:
        """The dequantized weight, in float32."""
        import torch

        scheme, rows, columns = self.matrix.scheme, self.matrix.rows, self.matrix.columns
        tensors = {**scheme.constants(), **{key: self.matrix.read(key) for key in self.matrix.parts}}
        W = scheme.unpack(rows, columns, tensors, torch.float32)
        return W.t().contiguous() if self.flipped else W
