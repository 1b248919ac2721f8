"""Packed weights: those of a checkpoint that another library has quantized, kept in its bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from adaptc.registered import register
from adaptc.scheme import Scheme
from adaptc.weights import Weight

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Bits:
    """A matrix `(rows, columns)` as a checkpoint stores it, laid out as one of our schemes has it.

    Attributes:
        scheme: what the bits stand for.
        rows: outputs of the layer.
        columns: its inputs.
        parts: argument of the scheme's `dequantize` -> reads the tensor.
    """

    scheme: Scheme
    rows: int
    columns: int
    parts: Mapping[str, Callable[[], Tensor]]

    def beside(self, key: str, read: Callable[[], Tensor]) -> Bits:
        """The same with one more tensor."""
        return replace(self, parts={**self.parts, key: read})


Reader = Callable[[Mapping[str, Any], str, Mapping[str, Weight]], "Bits | None"]
"""Given a checkpoint's `quantization_config`, a module's name and the tensors by their keys, the module's weight in
bits, or None where it is stored in floats. Headers are read, and of tensors only what tells the format."""
READERS: dict[str, Reader] = {}
"""Every reader known, by its `quant_method`. Filled by the decorator; see `registry.load_readers`."""

R = TypeVar("R", bound=Reader)


def stored_by(method: str) -> Callable[[R], R]:
    """Register a reader under the `quant_method` of the checkpoints that it reads.

    Raises:
        ValueError: the name is not kebab-case, or another reader has it.
    """

    def decorate(reader: R) -> R:
        register(READERS, "reader", method, reader)
        return reader

    return decorate


@dataclass(frozen=True, eq=False)
class Packed(Weight):
    """A weight that a checkpoint holds in bits. Loaded it is floats; as a leaf it stays as it is.

    Attributes:
        bits: the matrix `(out, in)`.
        shape: of the weight, as the model has it.
        dtype: of the weight.
        flipped: the model stores the transpose, `(in, out)`.
    """

    bits: Bits
    shape: tuple[int, ...]
    dtype: Any
    flipped: bool

    def load(self) -> Tensor:
        """What the bits stand for, in the weight's dtype."""
        return self.exact().to(self.dtype)

    def exact(self) -> Tensor:
        """What the bits stand for, float32."""
        scheme, rows, columns = self.bits.scheme, self.bits.rows, self.bits.columns
        held = {**scheme.constants(), **{key: read() for key, read in self.bits.parts.items()}}
        W = scheme.unpack(rows, columns, held)
        return W.t().contiguous() if self.flipped else W
