"""GPTQ: integers in blocks, packed along the inputs in words of 32 bits, as AutoGPTQ and GPTQModel write them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from adaptc.errors import WeightError
from adaptc.quantization.integer import unpack
from adaptc.quantization.packed import PackedMatrix
from adaptc.quantization.readers import (
    group_size,
    integer_matrix,
    integer_option,
    packed_tensors,
    required_tensor,
    stored_by,
)
from adaptc.quantization.scheme import SCHEMES
from adaptc.weights import Weight

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = {"gptq": 1, "gptq_v2": 0}
"""Format of a checkpoint -> what it subtracts from each zero before it stores it."""


@stored_by("gptq")
def gptq(config: Mapping[str, Any], module: str, tensors: Mapping[str, Weight]) -> PackedMatrix | None:
    """`qweight (in bits / 32, out)`, `qzeros (groups, out bits / 32)`, `scales (groups, out)`, `g_idx (in)`.

    `g_idx` is the group of each input, where inputs were rounded in the order of their size (`desc_act`).

    Raises:
        WeightError: a tensor is missing or has another size, or the format is not known.
    """
    import torch

    stored = packed_tensors(tensors, module)
    if stored is None:
        return None
    qweight, qzeros, scales = stored
    bits, group = integer_option(config, "bits"), group_size(config)
    form = config.get("checkpoint_format", "gptq")
    if bits not in (2, 4, 8) or form not in FORMATS:
        raise WeightError(
            f"{module}: {bits} bits in the format {form!r}; expected 2, 4 or 8 in {' or '.join(FORMATS)}"
        )
    subtracted = FORMATS[form] * sum(1 << position for position in range(0, 32, bits))
    columns, rows = qweight.shape[0] * 32 // bits, qweight.shape[1]
    order = None if group is None else _order(module, tensors, columns, group)
    options = {"block_size": group, "symmetric": bool(config.get("sym", True))}
    if order is None:
        scheme: Any = SCHEMES[f"int{bits}"](**options)
    else:
        scheme = SCHEMES["gptq"](**options, **{"bits": bits, "act_order": True})

    def codes() -> Tensor:
        unpacked = unpack(qweight.load().t().contiguous().view(torch.uint8), bits)
        return unpacked if order is None else unpacked[:, order]

    def zeros() -> Tensor:
        # Added to whole words, since the format subtracts so: a zero of 0 borrows from its neighbour.
        packed = (qzeros.load().long() + subtracted).bitwise_and(2**32 - 1).int()
        return unpack(packed.view(torch.uint8), bits)[:, :rows].t()

    matrix = integer_matrix(scheme, rows, columns, codes, zeros, scales, module)
    return matrix if order is None else matrix.with_part("order", lambda: order.int())


def _order(module: str, tensors: Mapping[str, Weight], columns: int, group: int) -> Tensor | None:
    """The indices of the inputs, sorted by group; None where the inputs are sorted so already."""
    import torch

    if f"{module}.g_idx" not in tensors:
        return None
    groups = required_tensor(tensors, f"{module}.g_idx", (columns,)).load().long()
    order = torch.argsort(groups, stable=True)
    inputs = torch.arange(columns)
    if not torch.equal(groups[order], inputs // group):
        raise WeightError(f"{module}.g_idx: expected groups of {group} inputs each")
    return None if torch.equal(order, inputs) else order
