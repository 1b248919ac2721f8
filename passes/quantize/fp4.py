"""FP4: four-bit floats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adaptc.quantization.codebook import TableBlocks
from adaptc.quantization.scheme import scheme

MAGNITUDES = (0.0, 0.0052083333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25)


@scheme("fp4")
@dataclass(frozen=True)
class Fp4(TableBlocks):
    """W = absmax table[codes]        codes 4 bits: a sign, two of an exponent, one of a fraction

    Dettmers et al. 2023 (QLoRA), section 5; the values, in units of the largest, are bitsandbytes'.
    """

    values: ClassVar[tuple[float, ...]] = (*MAGNITUDES, 0.0, *(-value for value in MAGNITUDES[1:]))
    runtime_type: ClassVar[int] = 0
