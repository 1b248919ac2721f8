"""INT8: eight-bit integers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adaptc.quantization.integer import IntegerBlocks
from adaptc.quantization.scheme import scheme


@scheme("int8")
@dataclass(frozen=True)
class Int8(IntegerBlocks):
    """W = scales (codes - zeros)        codes 8 bits, a scale for each row, or each `block_size` columns of it"""

    width: ClassVar[int] = 8
