"""Integers in blocks: what the integer schemes share, in the layout of ONNX Runtime's MatMulNBits."""

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
Bits = Annotated[Literal[2, 4, 8], Field(description="bits of a code")]
Clip = Annotated[bool, Field(description="search each block's range for the least squared error")]
SMALLEST = 16
"""The smallest block that ONNX Runtime's kernel takes."""
SHRUNK = tuple(1 - step / 40 for step in range(1, 21))
"""Shares of a block's range that `clip` tries besides the whole: 20 steps down to a half. Chosen by hand: a step is
smaller than what one code of 2 or 4 bits covers. benchmarks/results.md has what `clip` gains."""


@dataclass(frozen=True)
class IntegerBlocks(Scheme):
    """W = scales (codes - zeros), of every block of columns.

    Stored: codes uint8 (rows, blocks, block bits / 8), the first of a byte in its lowest bits; scales float32
    (rows, blocks); zeros uint8 (rows, ⌈blocks bits / 8⌉), packed like codes, unless symmetric: then each is 2^(bits-1).
    A last block that is shorter is filled with zeros.
    """

    block_size: BlockSize = None
    symmetric: Symmetric = True
    clip: Clip = False

    small: ClassVar[Mapping[str, object]] = {"block_size": 16}
    integer_products: ClassVar[bool] = False
    """Whether an ONNX artifact multiplies integers: it rounds a product's activations to 8 bits, in one range."""
    width: ClassVar[int]
    """Bits of a code: what the class sets, where it is no option."""

    @property
    def bits(self) -> int:
        """Bits of a code: 2, 4 or 8."""
        return self.width

    def refuses(self, rows: int, columns: int) -> Fault | None:
        """Refuse block sizes that no kernel takes."""
        b = self.block_size
        if b is not None and (b < SMALLEST or b & (b - 1)):
            return Fault(("block_size",), f"expected a power of two from 16 on, got {b}")
        return None

    def block(self, columns: int) -> int:
        """The columns of a block.

        `block_size`, or for a narrower row the next power of two; without `block_size` the row, filled to whole bytes.
        """
        if self.block_size is None:
            return -(-columns * self.bits // 8) * 8 // self.bits
        return min(self.block_size, max(SMALLEST, 1 << (columns - 1).bit_length()))

    def blocks(self, columns: int) -> int:
        """The number of blocks of a row."""
        return -(-columns // self.block(columns))

    def stored(self, rows: int, columns: int) -> dict[str, StoredTensor]:
        """`codes`, `scales`, and `zeros` unless symmetric."""
        n = self.blocks(columns)
        tensors = {
            "codes": StoredTensor((rows, n, self.block(columns) * self.bits // 8), "uint8"),
            "scales": StoredTensor((rows, n), "float32"),
        }
        if not self.symmetric:
            tensors["zeros"] = StoredTensor((rows, -(-n * self.bits // 8)), "uint8")
        return tensors

    def quantize(self, W: Tensor, inputs: Tensor | None = None) -> dict[str, Tensor]:
        """Round each weight to the nearest code."""
        values = self.blocked(W)
        scales, zeros = self.ranges(values)
        return self.packed(self.rounded(values, scales, zeros), scales, zeros)

    def transformed_inputs(self, x: Tensor, tensors: Tensors) -> Tensor:
        """The inputs `T(x)` `(..., columns)` for the stored matrix S: x Wᵀ = T(x) Sᵀ, with W as `restored` gives it.

        The identity, unless the scheme stores the columns scaled or in another order.
        """
        return x

    def restored(self, S: Tensor, tensors: Tensors) -> Tensor:
        """The dequantized matrix W `(rows, columns)` of the stored matrix S `scales (codes - zeros)`."""
        return S

    def blocked(self, W: Tensor) -> Tensor:
        """A matrix `(rows, columns)` as `(rows, blocks, block)`, the last block filled with zeros."""
        from torch.nn.functional import pad

        b = self.block(W.shape[1])
        return pad(W, (0, -W.shape[1] % b)).reshape(W.shape[0], -1, b)

    def ranges(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The scale and the zero of each block of values `(..., block)`: two tensors `(..., 1)`."""
        import torch

        scales, zeros = self.range_of(values, 1.0)
        least = self.error(values, scales, zeros)
        for share in SHRUNK if self.clip else ():
            tried = self.range_of(values, share)
            error = self.error(values, *tried)
            better = error < least
            scales, zeros = torch.where(better, tried[0], scales), torch.where(better, tried[1], zeros)
            least = torch.where(better, error, least)
        return scales, zeros

    def error(self, values: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """The squared rounding error of each block of values `(..., block)`: `(..., 1)`."""
        dequantized = scales * (self.rounded(values, scales, zeros) - zeros)
        return (dequantized - values).square().sum(-1, keepdim=True)

    def range_of(self, values: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """The scale and the zero of each block of values `(..., block)`, for a share of its range.

        Symmetric codes reach one step further below the middle than above it, so the value farthest from zero gets
        code 0: the scale is negative where that value is positive.

        Returns:
            Scales and zeros, both float32 `(..., 1)`.
        """
        import torch

        top, half = 2**self.bits - 1, 2 ** (self.bits - 1)
        low, high = values.amin(-1, keepdim=True) * share, values.amax(-1, keepdim=True) * share
        if self.symmetric:
            farthest = torch.where(high > -low, high, low)
            scales = -farthest / half
            return torch.where(scales == 0, 1.0, scales), torch.full_like(scales, float(half))
        low, high = low.clamp(max=0), high.clamp(min=0)
        scales = (high - low) / top
        scales = torch.where(scales == 0, 1.0, scales)
        return scales, (-low / scales).round().clamp(0, top)

    def rounded(self, values: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """The nearest codes of values, as floats; scales and zeros broadcast."""
        return (values / scales + zeros).round().clamp(0, 2**self.bits - 1)

    def packed(self, codes: Tensor, scales: Tensor, zeros: Tensor) -> dict[str, Tensor]:
        """The tensors to store, of codes `(rows, blocks, block)`, and scales and zeros `(rows, blocks, 1)`."""
        tensors = {"codes": pack(codes, self.bits), "scales": scales.squeeze(-1).float().contiguous()}
        return tensors if self.symmetric else tensors | {"zeros": pack(zeros.squeeze(-1), self.bits)}

    def dequantize(self, rows: int, columns: int, tensors: Tensors) -> Tensor:
        """`scales (codes - zeros)`, restored: (rows, columns), float32."""
        codes, scales = unpack(tensors["codes"], self.bits), tensors["scales"]
        if self.symmetric:
            values = codes.to(scales.dtype) - 2 ** (self.bits - 1)
        else:
            zeros = unpack(tensors["zeros"], self.bits)[..., : scales.shape[-1]]
            values = codes.to(scales.dtype) - zeros.to(scales.dtype).unsqueeze(-1)
        return self.restored((values * scales.unsqueeze(-1)).flatten(-2)[..., :columns], tensors)

    def unpack(self, rows: int, columns: int, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        """Dequantize with all codes of a byte looked up at once, and no more than one matrix in memory."""
        from torch.nn.functional import embedding

        if self.bits == 8:
            return IntegerBlocks.dequantize(self, rows, columns, tensors).to(dtype)
        scales = tensors["scales"]
        values = embedding(tensors["codes"].int(), codes_of_bytes(self.bits).to(scales)).flatten(-2)
        if self.symmetric:
            values.sub_(2 ** (self.bits - 1))
        else:
            values.sub_(unpack(tensors["zeros"], self.bits)[:, : scales.shape[1]].unsqueeze(-1))
        return self.restored(values.mul_(scales.unsqueeze(-1)).flatten(1)[:, :columns], tensors).to(dtype)

    def lookup(self, rows: int, columns: int, tensors: Tensors, ids: Tensor) -> Tensor:
        """Dequantize these rows only."""
        return self.dequantize(rows, columns, {name: tensor[ids] for name, tensor in tensors.items()})


@dataclass(frozen=True)
class CalibratedBlocks(IntegerBlocks):
    """Integers in blocks, rounded so that the layer's outputs on calibration inputs change least."""

    bits: Bits = 4  # type: ignore[assignment]

    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    calibrated: ClassVar[bool] = True

    def without_inputs(self) -> IntegerBlocks:
        """The scheme with as many bits that rounds each weight to the nearest code."""
        plain = next(cls for cls in plain_integers() if cls.width == self.bits)
        return plain(self.block_size, self.symmetric, self.clip)


def plain_integers() -> list[type[IntegerBlocks]]:
    """The schemes that round each weight to the nearest code, one a width, the fewest bits first."""
    integers = [cls for cls in SCHEMES.values() if issubclass(cls, IntegerBlocks)]
    plain = [cls for cls in integers if not cls.calibrated and not cls.integer_products]
    return sorted(plain, key=lambda cls: cls.width)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes `(..., n)` as bytes `(..., ⌈n bits / 8⌉)`, the first of a byte in its lowest bits."""
    import torch
    from torch.nn.functional import pad

    if bits == 8:
        return codes.byte().contiguous()
    each = 8 // bits
    grouped = torch.unflatten(pad(codes.byte(), (0, -codes.shape[-1] % each)), -1, (-1, each))
    packed = grouped[..., 0]
    for index in range(1, each):
        packed = packed | (grouped[..., index] << (bits * index))
    return packed.contiguous()


@cache
def codes_of_bytes(bits: int) -> Tensor:
    """The codes of each value of a byte: (256, 8 / bits), float32."""
    import torch

    return unpack(torch.arange(256, dtype=torch.uint8).unsqueeze(1), bits).float()


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Bytes `(..., n)` as codes `(..., n 8 / bits)`, uint8."""
    import torch

    if bits == 8:
        return packed
    codes = [(packed >> (bits * index) if index else packed) & (2**bits - 1) for index in range(8 // bits)]
    return torch.stack(codes, -1).flatten(-2)
