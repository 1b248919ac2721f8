"""NF4: four bits at the quantiles of a normal distribution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adaptc.quantization.codebook import TableBlocks
from adaptc.quantization.scheme import scheme


@scheme("nf4")
@dataclass(frozen=True)
class Nf4(TableBlocks):
    """W = absmax table[codes]        codes 4 bits, blocks of `block_size` along the flattened weight

    Dettmers et al. 2023 (QLoRA), section 3 and appendix E: if weights are normally distributed, as many are rounded to
    each of the 16 values. Stored codes, scales and results are bitsandbytes'.
    """

    values: ClassVar[tuple[float, ...]] = (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    )
    runtime_type: ClassVar[int] = 1
