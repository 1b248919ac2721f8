"""AWQ: integers in blocks of four bits, packed along the outputs in words of 32 bits, as AutoAWQ's GEMM has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from adaptc.errors import WeightError
from adaptc.quantization.integer import unpack
from adaptc.quantization.packed import PackedMatrix
from adaptc.quantization.readers import group_of, integer_bits, number, stored_by, words_of
from adaptc.quantization.scheme import SCHEMES
from adaptc.weights import Weight

if TYPE_CHECKING:
    from torch import Tensor

BITS = 4
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word each of eight outputs stands."""


@stored_by("awq")
def awq(about: Mapping[str, Any], module: str, tensors: Mapping[str, Weight]) -> PackedMatrix | None:
    """`qweight (in, out / 8)`, `qzeros (groups, out / 8)`, `scales (groups, out)`; inputs are scaled before."""
    found = words_of(tensors, module)
    if found is None:
        return None
    qweight, qzeros, scales = found
    bits, group = number(about, "bits", BITS), group_of(about)
    form = str(about.get("version", "gemm")).lower()
    if bits != BITS or form != "gemm":
        raise WeightError(f"{module}: {bits} bits in the format {form!r}; expected 4 in 'gemm'")
    columns, rows = qweight.shape[0], qweight.shape[1] * len(PLACES)
    options = {"block_size": group, "symmetric": not about.get("zero_point", True)}
    scheme: Any = SCHEMES["int4"](**options)

    def codes() -> Tensor:
        return _fields(qweight.load()).t()

    def zeros() -> Tensor:
        return _fields(qzeros.load()).t()

    return integer_bits(scheme, rows, columns, codes, zeros, scales, module)


def _fields(words: Tensor) -> Tensor:
    """The numbers of every word in their order: (n, 8 words)."""
    import torch

    found = unpack(words.contiguous().view(torch.uint8), BITS).unflatten(-1, (-1, len(PLACES)))
    return found[..., list(PLACES)].flatten(-2)
