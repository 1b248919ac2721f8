"""Dynamic INT8: 8-bit weights, and 8-bit activations in an ONNX artifact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from adaptc.errors import Fault
from adaptc.quantization.integer import IntegerBlocks
from adaptc.quantization.scheme import scheme


@scheme("dynamic-int8")
@dataclass(frozen=True)
class DynamicInt8(IntegerBlocks):
    """y = x_scale scales ((x_codes - x_zero) (codes - 128)ᵀ)        8 bits, a scale for each row

    An ONNX artifact rounds the activations x of each product to 8 bits, in one range that it finds at run time (ONNX's
    DynamicQuantizeLinear), and multiplies integers. Torch has no such product, so there activations are not rounded.
    """

    width: ClassVar[int] = 8
    integer_products: ClassVar[bool] = True
    small: ClassVar[Mapping[str, object]] = {}
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "embedding"})

    def refuses(self, rows: int, columns: int) -> Fault | None:
        """Refuse all but one scale for each row of symmetric codes: others are no factor of a product of integers."""
        if self.block_size is not None:
            return Fault(("block_size",), "a product of integers has one scale for each row: leave it out")
        if not self.symmetric:
            return Fault(("symmetric",), "a product of integers wants symmetric weights")
        return None
