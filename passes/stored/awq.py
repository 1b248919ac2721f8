"""AWQ: integers in blocks of four bits, packed along the outputs in words of 32 bits, as AutoAWQ's GEMM has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from adaptc.errors import WeightError
from adaptc.quantization.integer import unpack
from adaptc.quantization.packed import PackedMatrix
from adaptc.quantization.readers import group_size, integer_matrix, integer_option, packed_tensors, stored_by
from adaptc.quantization.scheme import SCHEMES
from adaptc.weights import Weight

if TYPE_CHECKING:
    from torch import Tensor

BITS = 4
ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""The field of a word that holds each of its eight outputs."""


@stored_by("awq")
def awq(config: Mapping[str, Any], module: str, tensors: Mapping[str, Weight]) -> PackedMatrix | None:
    """`qweight (in, out / 8)`, `qzeros (groups, out / 8)`, `scales (groups, out)`.

    The scales of the inputs are no part of it: AutoAWQ folds them into the operation upstream.

    Raises:
        WeightError: a tensor is missing or has another size, or the format is not AutoAWQ's GEMM of 4 bits.
    """
    stored = packed_tensors(tensors, module)
    if stored is None:
        return None
    qweight, qzeros, scales = stored
    bits, group = integer_option(config, "bits", BITS), group_size(config)
    form = str(config.get("version", "gemm")).lower()
    if bits != BITS or form != "gemm":
        raise WeightError(f"{module}: {bits} bits in the format {form!r}; expected 4 in 'gemm'")
    columns, rows = qweight.shape[0], qweight.shape[1] * len(ORDER)
    options = {"block_size": group, "symmetric": not config.get("zero_point", True)}
    scheme: Any = SCHEMES["int4"](**options)

    def codes() -> Tensor:
        return _fields(qweight.load()).t()

    def zeros() -> Tensor:
        return _fields(qzeros.load()).t()

    return integer_matrix(scheme, rows, columns, codes, zeros, scales, module)


def _fields(packed: Tensor) -> Tensor:
    """The eight numbers of each word, in the order of the outputs: int32 (n, words) as uint8 (n, 8 words)."""
    import torch

    fields = torch.unflatten(unpack(packed.contiguous().view(torch.uint8), BITS), -1, (-1, len(ORDER)))
    return fields[..., list(ORDER)].flatten(-2)
