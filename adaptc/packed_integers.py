"""Integers in blocks as other libraries store them, laid out as ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from adaptc.errors import WeightError
from adaptc.integer_blocks import IntegerBlocks, pack
from adaptc.packed import Bits
from adaptc.weights import Weight

if TYPE_CHECKING:
    from torch import Tensor


def words_of(tensors: Mapping[str, Weight], module: str, key: str) -> Weight:
    """One of a module's tensors.

    Raises:
        WeightError: it is not there, or integers are not in words of 32 bits.
    """
    found = tensors.get(f"{module}.{key}")
    if found is None:
        raise WeightError(f"{module}.{key} is missing, without which {module}.qweight means nothing")
    if not found.dtype.is_floating_point and found.dtype.itemsize != 4:
        raise WeightError(f"{module}.{key} is {found.dtype}; expected words of 32 bits")
    return found


def integer_bits(
    scheme: IntegerBlocks,
    rows: int,
    columns: int,
    codes: Callable[[], Tensor],
    zeros: Callable[[], Tensor],
    scales: Callable[[], Tensor],
    module: str,
) -> Bits:
    """Bits of integers in blocks, packed as `scheme` has them when they are asked for.

    Args:
        scheme: what they stand for.
        rows: outputs of the layer.
        columns: its inputs.
        codes: gives them, one a byte: `(rows, columns)`.
        zeros: gives one a block: `(rows, blocks)`.
        scales: gives one a block, floats: `(rows, blocks)`.
        module: whose they are, for messages.
    """
    n = scheme.blocks(columns)

    def blocks() -> Tensor:
        from torch.nn.functional import pad

        filled = pad(codes(), (0, n * scheme.block(columns) - columns))
        return pack(filled.reshape(rows, n, -1), scheme.bits)

    def ranges() -> Tensor:
        middle = 2 ** (scheme.bits - 1)
        if scheme.symmetric and not (zeros() == middle).all():
            raise WeightError(
                f"{module}.qzeros: the checkpoint calls its codes symmetric, but its zeros are not all {middle}"
            )
        return scales().float().contiguous()

    parts = {"codes": blocks, "scales": ranges}
    if not scheme.symmetric:
        parts["zeros"] = lambda: pack(zeros(), scheme.bits)
    return Bits(scheme, rows, columns, parts)
