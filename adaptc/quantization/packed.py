"""Packed weights: those of a checkpoint that another library has quantized, kept in its bits."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from adaptc.errors import DefinitionError, WeightError
from adaptc.quantization.scheme import Scheme
from adaptc.registry.author import Author
from adaptc.weights import Weight

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PackedMatrix:
    """A matrix `(rows, columns)` as a checkpoint stores it, laid out as one of our schemes has it.

    Attributes:
        scheme: what the bits stand for.
        rows: outputs of the layer.
        columns: its inputs.
        parts: argument of the scheme's `dequantize` -> reads the tensor.
        name: whose it is, for messages.
    """

    scheme: Scheme
    rows: int
    columns: int
    parts: Mapping[str, Callable[[], Tensor]]
    name: str

    def read(self, key: str) -> Tensor:
        """One of its tensors.

        Raises:
            WeightError: it holds NaN or infinity.
        """
        found = self.parts[key]()
        if found.is_floating_point() and not found.isfinite().all():
            raise WeightError(
                f"{self.name}: its {key} hold NaN or infinity, so that the layer computes nothing",
                "mend the checkpoint",
            )
        return found

    def beside(self, key: str, read: Callable[[], Tensor]) -> PackedMatrix:
        """The same with one more tensor."""
        return replace(self, parts={**self.parts, key: read})


def _check(name: str, reader: Any, author: Author) -> None:
    try:
        inspect.signature(reader).bind("about", "module", "tensors")
    except TypeError as error:
        raise DefinitionError(
            f"reader {name!r} cannot be called as {reader.__name__}(about, module, tensors): {error}",
            author.place,
        ) from error


@dataclass(frozen=True, eq=False)
class PackedWeight(Weight):
    """A weight that a checkpoint holds in bits. Loaded it is floats; as a leaf it stays as it is.

    Attributes:
        bits: the matrix `(out, in)`.
        shape: of the weight, as the model has it.
        dtype: of the weight.
        flipped: the model stores the transpose, `(in, out)`.
    """

    bits: PackedMatrix
    shape: tuple[int, ...]
    dtype: Any
    flipped: bool

    def load(self) -> Tensor:
        """What the bits stand for, in the weight's dtype."""
        return self.exact().to(self.dtype)

    def exact(self) -> Tensor:
        """What the bits stand for, float32."""
        import torch

        scheme, rows, columns = self.bits.scheme, self.bits.rows, self.bits.columns
        held = {**scheme.constants(), **{key: self.bits.read(key) for key in self.bits.parts}}
        W = scheme.unpack(rows, columns, held, torch.float32)
        return W.t().contiguous() if self.flipped else W
