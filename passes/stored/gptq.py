"""GPTQ: integers in blocks, packed along the inputs in words of 32 bits, as AutoGPTQ and GPTQModel write them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from adaptc.errors import WeightError
from adaptc.quantization.integer import unpack
from adaptc.quantization.packed import PackedMatrix
from adaptc.quantization.readers import group_of, integer_bits, needed, number, stored_by, words_of
from adaptc.quantization.scheme import SCHEMES
from adaptc.weights import Weight

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = {"gptq": 1, "gptq_v2": 0}
"""What a checkpoint holds less than each zero is."""


@stored_by("gptq")
def gptq(about: Mapping[str, Any], module: str, tensors: Mapping[str, Weight]) -> PackedMatrix | None:
    """`qweight (in bits / 32, out)`, `qzeros (groups, out bits / 32)`, `scales (groups, out)`, `g_idx (in)`.

    `g_idx` is the group of every input, where these were rounded in the order of what they matter (`desc_act`).
    """
    import torch

    words = words_of(tensors, module)
    if words is None:
        return None
    qweight, qzeros, scales = words
    bits, group = number(about, "bits"), group_of(about)
    form = about.get("checkpoint_format", "gptq")
    if bits not in (2, 4, 8) or form not in FORMATS:
        raise WeightError(
            f"{module}: {bits} bits in the format {form!r}; expected 2, 4 or 8 in {' or '.join(FORMATS)}"
        )
    less = FORMATS[form] * sum(1 << place for place in range(0, 32, bits))
    columns, rows = qweight.shape[0] * 32 // bits, qweight.shape[1]
    order = None if group is None else _order(module, tensors, columns, group)
    options = {"block_size": group, "symmetric": bool(about.get("sym", True))}
    if order is None:
        scheme: Any = SCHEMES[f"int{bits}"](**options)
    else:
        scheme = SCHEMES["gptq"](bits=bits, act_order=True, **options)  # type: ignore[call-arg]

    def codes() -> Tensor:
        found = unpack(qweight.load().t().contiguous().view(torch.uint8), bits)
        return found if order is None else found[:, order]

    def zeros() -> Tensor:
        # Added to whole words: a zero of 0 is stored as a borrow from its neighbour.
        words = (qzeros.load().long() + less).bitwise_and(2**32 - 1).int()
        return unpack(words.view(torch.uint8), bits)[:, :rows].t()

    found = integer_bits(scheme, rows, columns, codes, zeros, scales, module)
    return found if order is None else found.beside("order", lambda: order.int())


def _order(module: str, tensors: Mapping[str, Weight], columns: int, group: int) -> Tensor | None:
    """The inputs group by group; None where they stand so already."""
    import torch

    if f"{module}.g_idx" not in tensors:
        return None
    groups = needed(tensors, f"{module}.g_idx", (columns,)).load().long()
    order = torch.argsort(groups, stable=True)
    whole = torch.arange(columns)
    if not torch.equal(groups[order], whole // group):
        raise WeightError(f"{module}.g_idx: expected groups of {group} inputs each")
    return None if torch.equal(order, whole) else order
