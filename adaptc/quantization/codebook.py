"""Four-bit codes that look a value up in a table, in blocks with a scale each: bitsandbytes' formats, bit for bit."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from adaptc.errors import Fault
from adaptc.quantization.scheme import Scheme, StoredTensor, Tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Block = Annotated[int, Field(description="numbers that share a scale: a power of two from 16 to 4096")]
Double = Annotated[bool, Field(description="store the scales in 8 bits too, in blocks of 256")]
NESTED = 256
"""Scales that share a scale, where they are quantized too."""
SMALLEST = 1e-38
"""What a block of zeros is divided by."""
CELLS = 2**16 - 1
SMALLEST_KERNEL = 32
"""The smallest block that bitsandbytes takes."""


@dataclass(frozen=True)
class TableBlocks(Scheme):
    """W = absmax table[codes], of every block of the flattened matrix; absmax is its largest absolute value.

    Kept: codes uint8 (⌈rows columns / 2⌉), the first of a byte in its high bits; absmax float32 (blocks). With `double`
    absmax is nested_table[absmax_codes] absmax_scales + absmax_offset instead, in blocks of 256 (Dettmers et al. 2023,
    section 3), the table that of 8-bit floats with a dynamic exponent (Dettmers 2016).
    """

    block_size: Block = 64
    double: Double = False

    values: ClassVar[tuple[float, ...]]
    """The table: what each of the 16 codes stands for."""
    runtime_type: ClassVar[int]
    """Its number in ONNX Runtime's MatMulBnb4."""
    small: ClassVar[Mapping[str, object]] = {"block_size": 16}
    aliases: ClassVar[Mapping[str, str]] = {"bnb_4bit_use_double_quant": "double"}

    def refuses(self, rows: int, columns: int) -> Fault | None:
        """Block sizes that no kernel takes."""
        b = self.block_size
        if not 16 <= b <= 4096 or b & (b - 1):
            return Fault(("block_size",), f"expected a power of two from 16 to 4096, got {b}")
        return None

    def blocks(self, rows: int, columns: int) -> int:
        """Blocks of the flattened matrix, of which the last may be ragged."""
        return -(-rows * columns // self.block_size)

    def stored(self, rows: int, columns: int) -> dict[str, StoredTensor]:
        """Codes, and the scales or what makes them."""
        n = self.blocks(rows, columns)
        kept = {"codes": StoredTensor((-(-rows * columns // 2),), "uint8")}
        if not self.double:
            return kept | {"absmax": StoredTensor((n,), "float32")}
        return kept | {
            "absmax_codes": StoredTensor((n,), "uint8"),
            "absmax_scales": StoredTensor((-(-n // NESTED),), "float32"),
            "absmax_offset": StoredTensor((), "float32"),
        }

    def constants(self) -> dict[str, Tensor]:
        """The table; the scales' too."""
        import torch

        table = {"table": torch.tensor(self.values)}
        return table | {"nested_table": dynamic_table()} if self.double else table

    def quantize(self, W: Tensor, inputs: Tensor | None = None) -> dict[str, Tensor]:
        """The nearest values of the table, in units of a block's largest."""
        codes, absmax = nearest(W.flatten(), self.constants()["table"], self.block_size)
        kept = {"codes": (codes[0::2] << 4) | codes[1::2]}
        if not self.double:
            return kept | {"absmax": absmax}
        offset = absmax.mean()
        nested, scales = nearest_of_many(absmax - offset, dynamic_table(), NESTED)
        return kept | {"absmax_codes": nested, "absmax_scales": scales, "absmax_offset": offset}

    def dequantize(self, rows: int, columns: int, tensors: Tensors) -> Tensor:
        """`absmax table[codes]`."""
        values = looked_up(tensors["codes"], tensors["table"])[: rows * columns]
        return scaled(values, self.absmax(tensors), self.block_size).reshape(rows, columns)

    def lookup(self, rows: int, columns: int, tensors: Tensors, ids: Tensor) -> Tensor:
        """Only these rows are read, where blocks do not go beyond a row."""
        if columns % self.block_size:
            return super().lookup(rows, columns, tensors, ids)
        codes = tensors["codes"].reshape(rows, -1)[ids]
        absmax = self.absmax(tensors).reshape(rows, -1)[ids]
        blocks = looked_up(codes, tensors["table"]).unflatten(-1, (-1, self.block_size))
        return (blocks * absmax.unsqueeze(-1)).flatten(-2)

    def absmax(self, tensors: Tensors) -> Tensor:
        """The scales of all blocks."""
        if not self.double:
            return tensors["absmax"]
        values = tensors["nested_table"].index_select(0, tensors["absmax_codes"].int())
        return scaled(values, tensors["absmax_scales"], NESTED) + tensors["absmax_offset"]

    def unpack(self, rows: int, columns: int, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        """By bitsandbytes' kernel, where it is installed; not for ragged rows, which it gets wrong on the CPU.

        In 16 bits it is 2 to 5 times as fast as in 32, and rounds alike.
        """
        if _operations() is None or columns % self.block_size or self.block_size < SMALLEST_KERNEL:
            return self.dequantize(rows, columns, tensors).to(dtype)
        codes, absmax = tensors["codes"].unsqueeze(1), self.absmax(tensors)
        made = dtype if dtype.itemsize == 2 else absmax.dtype
        kernel = _operations().dequantize_4bit.default
        return kernel(codes, absmax, self.block_size, self.name, [rows, columns], made).to(dtype)


def looked_up(codes: Tensor, table: Tensor) -> Tensor:
    """What packed codes stand for in a table."""
    import torch
    from torch.nn.functional import embedding

    each = torch.stack([codes >> 4, codes & 15], -1).flatten(-2)
    return embedding(each.int(), table.unsqueeze(1)).squeeze(-1)


def nearest(values: Tensor, table: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """For every value the code of the nearest in a small table, in units of its block's largest.

    Gives the codes, uint8, of an even number of values, and absmax.
    """
    import torch

    ordered, order = table.sort()
    bounds = (ordered[:-1] + ordered[1:]) / 2
    blocks = _filled(values, block)
    absmax = blocks.abs().amax(-1)
    units = (blocks * (1.0 / absmax.clamp(min=SMALLEST)).unsqueeze(-1)).clamp(-1, 1).flatten()
    whole = len(values) - len(values) % block
    if whole < len(values):  # bitsandbytes divides by the ragged one's, which rounds otherwise
        absmax[-1].clamp_(min=SMALLEST)
        units[whole:] = (blocks[-1] / absmax[-1]).clamp(-1, 1)
    units = units[: len(values) + len(values) % 2] if whole < len(values) else units
    return order[torch.bucketize(units, bounds)].byte(), absmax


def nearest_of_many(values: Tensor, table: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The same for a sorted table of 256, decided on a grid of 2^16 units as bitsandbytes does on the CPU."""
    import torch

    blocks = _filled(values, block)
    absmax = blocks.abs().amax(-1)
    units = blocks * (1.0 / absmax.unsqueeze(-1))
    cells = ((units.nan_to_num(-1.0).clamp(-1, 1) + 1.0) * 0.5 * CELLS + 0.5).floor()
    bounds = (table[:-1] + table[1:]) / 2
    found = torch.bucketize(torch.arange(CELLS + 1) / CELLS * 2 - 1, bounds)
    return found[cells.long().flatten()[: len(values)]].byte(), absmax


def scaled(values: Tensor, scales: Tensor, block: int) -> Tensor:
    """Every value of a block times its scale."""
    return (_filled(values, block) * scales.unsqueeze(-1)).flatten()[: len(values)]


def _filled(values: Tensor, block: int) -> Tensor:
    """`(blocks, block)`, filled with zeros."""
    import torch

    missing = -len(values) % block
    if missing:
        values = torch.cat([values, values.new_zeros(missing)])
    return values.reshape(-1, block)


@cache
def dynamic_table() -> Tensor:
    """The 256 values of 8-bit floats with a dynamic exponent: 7 decades, with more digits the larger they are."""
    import torch

    found = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        middles = (edges[:-1] + edges[1:]) / 2.0
        found += [sign * value for value in (10.0 ** (exponent - 6) * middles).tolist() for sign in (1, -1)]
    return torch.tensor(sorted(found))


def product_kernel() -> Any:
    """bitsandbytes' product with such a matrix, if one is installed that has it (0.50 on)."""
    return _operations().gemm_4bit.default if hasattr(_operations(), "gemm_4bit") else None


@cache
def _operations() -> Any:
    """bitsandbytes' operations, if it is installed."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)  # on loading it regrets kernels that nobody asked for
    try:
        import bitsandbytes  # noqa: F401 (registers the operations)
        import torch
    except ImportError:
        return None
    finally:
        logger.setLevel(level)
    return torch.ops.bitsandbytes
