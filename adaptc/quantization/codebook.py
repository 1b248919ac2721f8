"""Four-bit codes that look a value up in a table, in blocks with a scale each: bitsandbytes' formats, bit for bit."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from adaptc.errors import Fault
from adaptc.optional import MissingPackageError, optional
from adaptc.quantization.scheme import Scheme, StoredTensor, Tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Block = Annotated[int, Field(description="numbers that share a scale: a power of two from 16 to 4096")]
Double = Annotated[bool, Field(description="store the scales in 8 bits too, in blocks of 256")]
NESTED = 256
"""Scales that share a scale, where they are quantized too."""
SMALLEST = 1e-38
"""The smallest divisor of a block: bitsandbytes' own, for blocks of zeros."""
CELLS = 2**16 - 1
"""Steps of the grid on which bitsandbytes' CPU kernel decides for tables of 256 values."""
SMALLEST_KERNEL = 32
"""The smallest block that bitsandbytes takes."""


@dataclass(frozen=True)
class TableBlocks(Scheme):
    """W = absmax table[codes], of every block of the flattened matrix; absmax is its largest absolute value.

    Stored: codes uint8 (⌈rows columns / 2⌉), the first of a byte in its high bits; absmax float32 (blocks). With
    `double` absmax is nested_table[absmax_codes] absmax_scales + absmax_offset instead, in blocks of 256 (Dettmers et
    al. 2023, section 3), the table that of 8-bit floats with a dynamic exponent (Dettmers 2016).
    """

    block_size: Block = 64
    double: Double = False

    values: ClassVar[tuple[float, ...]]
    """The table: the value of each of the 16 codes, in units of a block's absmax."""
    runtime_type: ClassVar[int]
    """The number of the table in ONNX Runtime's MatMulBnb4: its attribute `quant_type`."""
    small: ClassVar[Mapping[str, object]] = {"block_size": 16}
    aliases: ClassVar[Mapping[str, str]] = {"bnb_4bit_use_double_quant": "double"}

    def refuses(self, rows: int, columns: int) -> Fault | None:
        """Refuse block sizes that no kernel takes."""
        b = self.block_size
        if not 16 <= b <= 4096 or b & (b - 1):
            return Fault(("block_size",), f"expected a power of two from 16 to 4096, got {b}")
        return None

    def blocks(self, rows: int, columns: int) -> int:
        """The number of blocks of the flattened matrix; the last may be shorter."""
        return -(-rows * columns // self.block_size)

    def stored(self, rows: int, columns: int) -> dict[str, StoredTensor]:
        """`codes`, and `absmax`, or with `double` the three tensors it is computed from."""
        n = self.blocks(rows, columns)
        codes = {"codes": StoredTensor((-(-rows * columns // 2),), "uint8")}
        if not self.double:
            return codes | {"absmax": StoredTensor((n,), "float32")}
        return codes | {
            "absmax_codes": StoredTensor((n,), "uint8"),
            "absmax_scales": StoredTensor((-(-n // NESTED),), "float32"),
            "absmax_offset": StoredTensor((), "float32"),
        }

    def constants(self) -> dict[str, Tensor]:
        """`table` (16,), float32; with `double` also `nested_table` (256,)."""
        import torch

        table = {"table": torch.tensor(self.values)}
        return table | {"nested_table": dynamic_table()} if self.double else table

    def quantize(self, W: Tensor, inputs: Tensor | None = None) -> dict[str, Tensor]:
        """Round to the nearest values of the table, in units of a block's absmax."""
        codes, absmax = nearest(W.flatten(), self.constants()["table"], self.block_size)
        packed = {"codes": (codes[0::2] << 4) | codes[1::2]}
        if not self.double:
            return packed | {"absmax": absmax}
        offset = absmax.mean()
        nested, scales = nearest_on_grid(absmax - offset, dynamic_table(), NESTED)
        return packed | {"absmax_codes": nested, "absmax_scales": scales, "absmax_offset": offset}

    def dequantize(self, rows: int, columns: int, tensors: Tensors) -> Tensor:
        """`absmax table[codes]`, (rows, columns), float32."""
        values = values_of_codes(tensors["codes"], tensors["table"])[: rows * columns]
        return scaled(values, self.absmax(tensors), self.block_size).reshape(rows, columns)

    def lookup(self, rows: int, columns: int, tensors: Tensors, ids: Tensor) -> Tensor:
        """Dequantize these rows only, where no block reaches into the next row; else the whole matrix."""
        import torch

        if columns % self.block_size:
            return super().lookup(rows, columns, tensors, ids)
        codes = tensors["codes"].reshape(rows, -1)[ids]
        absmax = self.absmax(tensors).reshape(rows, -1)[ids]
        values = values_of_codes(codes, tensors["table"])
        blocks = torch.unflatten(values, -1, (-1, self.block_size))
        return (blocks * absmax.unsqueeze(-1)).flatten(-2)

    def absmax(self, tensors: Tensors) -> Tensor:
        """The scale of each block, (blocks,), float32."""
        if not self.double:
            return tensors["absmax"]
        values = tensors["nested_table"].index_select(0, tensors["absmax_codes"].int())
        return scaled(values, tensors["absmax_scales"], NESTED) + tensors["absmax_offset"]

    def unpack(self, rows: int, columns: int, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        """Dequantize by bitsandbytes' kernel, where it is installed.

        Not where the last block of a row is shorter: there the CPU kernel gives wrong values. The kernel is asked for
        16 bits where the result has 16: that is 2 to 5 times as fast as 32, with the same rounding.
        """
        if _operations() is None or columns % self.block_size or self.block_size < SMALLEST_KERNEL:
            return self.dequantize(rows, columns, tensors).to(dtype)
        codes, absmax = tensors["codes"].unsqueeze(1), self.absmax(tensors)
        computed = dtype if dtype.itemsize == 2 else absmax.dtype
        kernel = _operations().dequantize_4bit.default
        return kernel(codes, absmax, self.block_size, self.name, [rows, columns], computed).to(dtype)


def values_of_codes(codes: Tensor, table: Tensor) -> Tensor:
    """The table's value for each code: bytes `(..., n)`, two codes each, give `(..., 2 n)`."""
    import torch
    from torch.nn.functional import embedding

    indices = torch.stack([codes >> 4, codes & 15], -1).flatten(-2)
    return embedding(indices.int(), table.unsqueeze(1)).squeeze(-1)


def nearest(values: Tensor, table: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Round values to the nearest of a table of 16, in units of the absmax of their block.

    Args:
        values: `(n,)`, float32.
        table: `(16,)`.
        block: values that share a scale.

    Returns:
        The codes, uint8, of n values, or n + 1 where n is odd; and absmax, the scale of each block.
    """
    import torch

    ordered, order = table.sort()
    bounds = (ordered[:-1] + ordered[1:]) / 2
    blocks = _filled(values, block)
    absmax = blocks.abs().amax(-1)
    units = (blocks * (1.0 / absmax.clamp(min=SMALLEST)).unsqueeze(-1)).clamp(-1, 1).flatten()
    whole = len(values) - len(values) % block
    if whole < len(values):  # bitsandbytes divides the shorter block by its absmax, which rounds otherwise
        absmax[-1].clamp_(min=SMALLEST)
        units[whole:] = (blocks[-1] / absmax[-1]).clamp(-1, 1)
    units = units[: len(values) + len(values) % 2] if whole < len(values) else units
    return order[torch.bucketize(units, bounds)].byte(), absmax


def nearest_on_grid(values: Tensor, table: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Round values to the nearest of a sorted table of 256, on a grid of 2^16 steps as bitsandbytes does on the CPU.

    Args:
        values: `(n,)`, float32.
        table: `(256,)`, sorted.
        block: values that share a scale.

    Returns:
        The codes, uint8 `(n,)`, and the scale of each block.
    """
    import torch

    blocks = _filled(values, block)
    absmax = blocks.abs().amax(-1)
    units = blocks * (1.0 / absmax.unsqueeze(-1))
    cells = ((units.nan_to_num(-1.0).clamp(-1, 1) + 1.0) * 0.5 * CELLS + 0.5).floor()
    bounds = (table[:-1] + table[1:]) / 2
    code_of_cell = torch.bucketize(torch.arange(CELLS + 1) / CELLS * 2 - 1, bounds)
    return code_of_cell[cells.long().flatten()[: len(values)]].byte(), absmax


def scaled(values: Tensor, scales: Tensor, block: int) -> Tensor:
    """Values `(n,)`, each times the scale of its block."""
    return (_filled(values, block) * scales.unsqueeze(-1)).flatten()[: len(values)]


def _filled(values: Tensor, block: int) -> Tensor:
    """Values `(n,)` as `(blocks, block)`, the last block filled with zeros."""
    import torch

    missing = -len(values) % block
    if missing:
        values = torch.cat([values, values.new_zeros(missing)])
    return values.reshape(-1, block)


@cache
def dynamic_table() -> Tensor:
    """The 256 values of 8-bit floats with a dynamic exponent: 7 decades, with more digits the larger they are."""
    import torch

    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        middles = (edges[:-1] + edges[1:]) / 2.0
        magnitudes = (10.0 ** (exponent - 6) * middles).unbind()
        values += [sign * float(magnitude) for magnitude in magnitudes for sign in (1, -1)]
    return torch.tensor(sorted(values))


def matmul_kernel() -> Any:
    """bitsandbytes' `gemm_4bit`, a product with a matrix of 4-bit codes; None where there is none (before 0.50)."""
    return _operations().gemm_4bit.default if hasattr(_operations(), "gemm_4bit") else None


@cache
def _operations() -> Any:
    """bitsandbytes' operations; None if it is not installed."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)  # on loading it warns of kernels that nobody asked for
    try:
        import torch

        optional("bitsandbytes")  # registers its operations with torch
    except MissingPackageError:
        return None
    finally:
        logger.setLevel(level)
    return torch.ops.bitsandbytes
