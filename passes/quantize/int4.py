"""INT4: four-bit integers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adaptc.quantization.integer import BlockSize, IntegerBlocks, Symmetric
from adaptc.quantization.scheme import scheme


@scheme("int4")
@dataclass(frozen=True)
class Int4(IntegerBlocks):
    """W = scales (codes - zeros)        codes 4 bits, a scale for each `block_size` columns of a row"""

    block_size: BlockSize = 128
    symmetric: Symmetric = False

    width: ClassVar[int] = 4
