"""AWQ: integers in blocks of four bits, packed along the outputs in words of 32 bits, as AutoAWQ's GEMM has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from adaptc.errors import WeightError
from adaptc.integer_blocks import unpack
from adaptc.packed import Bits, stored_by
from adaptc.packed_integers import integer_bits, words_of
from adaptc.registry import load_schemes
from adaptc.weights import Weight

if TYPE_CHECKING:
    from torch import Tensor

BITS = 4
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word each of eight outputs stands."""


@stored_by("awq")
def awq(about: Mapping[str, Any], module: str, tensors: Mapping[str, Weight]) -> Bits | None:
    """`qweight (in, out / 8)`, `qzeros (groups, out / 8)`, `scales (groups, out)`; inputs are scaled before."""
    if f"{module}.qweight" not in tensors:
        return None
    qweight, qzeros, scales = (words_of(tensors, module, key) for key in ("qweight", "qzeros", "scales"))
    bits, group = about.get("bits", BITS), about.get("group_size", 128)
    form = str(about.get("version", "gemm")).lower()
    if bits != BITS or form != "gemm":
        raise WeightError(f"{module}: {bits} bits in the format {form!r}; expected 4 in 'gemm'")
    columns, rows = qweight.shape[0], scales.shape[1]
    options = {"block_size": None if group == -1 else group, "symmetric": not about.get("zero_point", True)}
    scheme = load_schemes()["int4"](**options)

    def fields(words: Weight) -> Tensor:
        return _fields(words.load())[:, :rows].t()

    return integer_bits(
        scheme,  # type: ignore[arg-type]
        rows,
        columns,
        lambda: fields(qweight),
        lambda: fields(qzeros),
        lambda: scales.load().t(),
        module,
    )


def _fields(words: Tensor) -> Tensor:
    """The numbers of every word in their order: (n, 8 words)."""
    import torch

    found = unpack(words.contiguous().view(torch.uint8), BITS).unflatten(-1, (-1, len(PLACES)))
    return found[..., list(PLACES)].flatten(-2)
