"""Integers in blocks: what the integer schemes share, in the layout ONNX Runtime's MatMulNBits takes as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from adaptc.errors import Fault
from adaptc.quantization.scheme import SCHEMES, Scheme, StoredTensor, Tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BlockSize = Annotated[
    int | None,
    Field(
        description="columns that share a scale: a power of two from 16 on; a whole row if left out or null"
    ),
]
Symmetric = Annotated[bool, Field(description="zero is the middle code; else each block has its own")]
Bits = Annotated[Literal[2, 4, 8], Field(description="of a code")]
Clip = Annotated[bool, Field(description="search each block's range for the least squared error")]
SMALLEST = 16
"""The smallest block that kernels take."""
SHRUNK = tuple(1 - step / 40 for step in range(1, 21))
"""Parts of a block's range that the search tries besides all of it."""


@dataclass(frozen=True)
class IntegerBlocks(Scheme):
    """W = scales (codes - zeros), of every block of columns.

    Kept: codes uint8 (rows, blocks, block bits / 8), the first of a byte in its lowest bits; scales float32
    (rows, blocks); zeros uint8 (rows, ⌈blocks bits / 8⌉), packed alike, unless symmetric: then they are 2^(bits-1). A
    ragged last block is filled with zeros.
    """

    block_size: BlockSize = None
    symmetric: Symmetric = True
    clip: Clip = False

    small: ClassVar[Mapping[str, object]] = {"block_size": 16}
    integer_products: ClassVar[bool] = False
    """Whether ONNX multiplies integers: activations are rounded to 8 bits, in one range for all of a product's."""
    width: ClassVar[int]
    """Bits of a code."""

    @property
    def bits(self) -> int:
        """Bits of a code: 2, 4 or 8."""
        return self.width

    def refuses(self, rows: int, columns: int) -> Fault | None:
        """Block sizes that no kernel takes."""
        b = self.block_size
        if b is not None and (b < SMALLEST or b & (b - 1)):
            return Fault(("block_size",), f"expected a power of two from 16 on, got {b}")
        return None

    def block(self, columns: int) -> int:
        """Columns of a block: `block_size`, or less for a narrower row; without one the row, filled to whole bytes."""
        if self.block_size is None:
            return -(-columns * self.bits // 8) * 8 // self.bits
        return min(self.block_size, max(SMALLEST, 1 << (columns - 1).bit_length()))

    def blocks(self, columns: int) -> int:
        """Blocks of a row."""
        return -(-columns // self.block(columns))

    def stored(self, rows: int, columns: int) -> dict[str, StoredTensor]:
        """Codes, scales, and zeros where blocks have their own."""
        n = self.blocks(columns)
        kept = {
            "codes": StoredTensor((rows, n, self.block(columns) * self.bits // 8), "uint8"),
            "scales": StoredTensor((rows, n), "float32"),
        }
        return (
            kept
            if self.symmetric
            else kept | {"zeros": StoredTensor((rows, -(-n * self.bits // 8)), "uint8")}
        )

    def quantize(self, W: Tensor, inputs: Tensor | None = None) -> dict[str, Tensor]:
        """Round to the nearest code."""
        values = self.blocked(W)
        scales, zeros = self.ranges(values)
        return self.packed(self.rounded(values, scales, zeros), scales, zeros)

    def entering(self, x: Tensor, tensors: Tensors) -> Tensor:
        """What the integers are multiplied with in place of x `(..., columns)`: x M = x' M', see `leaving`."""
        return x

    def leaving(self, W: Tensor, tensors: Tensors) -> Tensor:
        """The matrix M `(rows, columns)` that M', what the integers stand for, is in other columns or scales of."""
        return W

    def blocked(self, W: Tensor) -> Tensor:
        """`(rows, blocks, block)`, filled with zeros."""
        from torch.nn.functional import pad

        b = self.block(W.shape[1])
        return pad(W, (0, -W.shape[1] % b)).reshape(W.shape[0], -1, b)

    def ranges(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero of every block `(..., block)`, as `(..., 1)`."""
        import torch

        scales, zeros = self.range_of(values, 1.0)
        least = self.error(values, scales, zeros)
        for part in SHRUNK if self.clip else ():
            tried = self.range_of(values, part)
            error = self.error(values, *tried)
            better = error < least
            scales, zeros = torch.where(better, tried[0], scales), torch.where(better, tried[1], zeros)
            least = torch.where(better, error, least)
        return scales, zeros

    def error(self, values: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """The squared error of every block."""
        back = scales * (self.rounded(values, scales, zeros) - zeros)
        return (back - values).square().sum(-1, keepdim=True)

    def range_of(self, values: Tensor, part: float) -> tuple[Tensor, Tensor]:
        """Scale and zero for a part of every block's range.

        Symmetric: what is farthest from zero gets the code that has no opposite, 0.
        """
        import torch

        top, half = 2**self.bits - 1, 2 ** (self.bits - 1)
        low, high = values.amin(-1, keepdim=True) * part, values.amax(-1, keepdim=True) * part
        if self.symmetric:
            farthest = torch.where(high > -low, high, low)
            scales = -farthest / half
            return torch.where(scales == 0, 1.0, scales), torch.full_like(scales, float(half))
        low, high = low.clamp(max=0), high.clamp(min=0)
        scales = (high - low) / top
        scales = torch.where(scales == 0, 1.0, scales)
        return scales, (-low / scales).round().clamp(0, top)

    def rounded(self, values: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """The nearest codes, as floats."""
        return (values / scales + zeros).round().clamp(0, 2**self.bits - 1)

    def packed(self, codes: Tensor, scales: Tensor, zeros: Tensor) -> dict[str, Tensor]:
        """What is kept of codes `(rows, blocks, block)`, and scales and zeros `(rows, blocks, 1)`."""
        kept = {"codes": pack(codes, self.bits), "scales": scales.squeeze(-1).float().contiguous()}
        return kept if self.symmetric else kept | {"zeros": pack(zeros.squeeze(-1), self.bits)}

    def dequantize(self, rows: int, columns: int, tensors: Tensors) -> Tensor:
        """`scales (codes - zeros)`."""
        codes, scales = unpack(tensors["codes"], self.bits), tensors["scales"]
        if self.symmetric:
            values = codes.to(scales.dtype) - 2 ** (self.bits - 1)
        else:
            zeros = unpack(tensors["zeros"], self.bits)[..., : scales.shape[-1]]
            values = codes.to(scales.dtype) - zeros.to(scales.dtype).unsqueeze(-1)
        return self.leaving((values * scales.unsqueeze(-1)).flatten(-2)[..., :columns], tensors)

    def unpack(self, rows: int, columns: int, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        """The same, with all codes of a byte looked up at once, and no more than one matrix in memory."""
        from torch.nn.functional import embedding

        if self.bits == 8:
            return IntegerBlocks.dequantize(self, rows, columns, tensors).to(dtype)
        scales = tensors["scales"]
        values = embedding(tensors["codes"].int(), codes_of_bytes(self.bits).to(scales)).flatten(-2)
        if self.symmetric:
            values.sub_(2 ** (self.bits - 1))
        else:
            values.sub_(unpack(tensors["zeros"], self.bits)[:, : scales.shape[1]].unsqueeze(-1))
        return self.leaving(values.mul_(scales.unsqueeze(-1)).flatten(1)[:, :columns], tensors).to(dtype)

    def lookup(self, rows: int, columns: int, tensors: Tensors, ids: Tensor) -> Tensor:
        """Only these rows are read."""
        return self.dequantize(rows, columns, {name: tensor[ids] for name, tensor in tensors.items()})


@dataclass(frozen=True)
class CalibratedBlocks(IntegerBlocks):
    """Integers in blocks that are chosen by the layer's inputs."""

    bits: Bits = 4  # type: ignore[assignment]

    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    calibrated: ClassVar[bool] = True

    def without_inputs(self) -> IntegerBlocks:
        """The same, rounded to nearest."""
        plain = next(cls for cls in plain_integers() if cls.width == self.bits)
        return plain(self.block_size, self.symmetric, self.clip)


def plain_integers() -> list[type[IntegerBlocks]]:
    """The schemes that round to nearest, one a width, from the fewest bits on."""
    found = [cls for cls in SCHEMES.values() if issubclass(cls, IntegerBlocks)]
    return sorted(
        (cls for cls in found if not cls.calibrated and not cls.integer_products), key=lambda cls: cls.width
    )


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes `(..., n)` as bytes `(..., ⌈n bits / 8⌉)`, the first of a byte in its lowest bits."""
    from torch.nn.functional import pad

    if bits == 8:
        return codes.byte().contiguous()
    each = 8 // bits
    grouped = pad(codes.byte(), (0, -codes.shape[-1] % each)).unflatten(-1, (-1, each))
    found = grouped[..., 0]
    for place in range(1, each):
        found = found | (grouped[..., place] << (bits * place))
    return found.contiguous()


@cache
def codes_of_bytes(bits: int) -> Tensor:
    """The codes in every byte: (256, 8 / bits), float32."""
    import torch

    return unpack(torch.arange(256, dtype=torch.uint8).unsqueeze(1), bits).float()


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Bytes `(..., n)` as codes `(..., n 8 / bits)`, uint8."""
    import torch

    if bits == 8:
        return packed
    codes = [(packed >> (bits * place) if place else packed) & (2**bits - 1) for place in range(8 // bits)]
    return torch.stack(codes, -1).flatten(-2)
