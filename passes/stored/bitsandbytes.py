"""bitsandbytes: matrices in four bits with a table, or in eight with a scale for each row."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from adaptc.errors import WeightError
from adaptc.quantization.codebook import NESTED
from adaptc.quantization.packed import PackedMatrix
from adaptc.quantization.readers import required_tensor, stored_by
from adaptc.quantization.scheme import SCHEMES
from adaptc.weights import Weight

if TYPE_CHECKING:
    from torch import Tensor

STATE = ".quant_state.bitsandbytes__"
TABLES = ("nf4", "fp4")
"""Its tables of 16 values, which are also the names of our schemes."""
LARGEST = 127
"""The code of the largest value of a row."""


@stored_by("bitsandbytes")
def bitsandbytes(
    config: Mapping[str, Any], module: str, tensors: Mapping[str, Weight]
) -> PackedMatrix | None:
    """`weight`, `weight.absmax` and a `weight.quant_state` in JSON; or int8 `weight` and `SCB`, its rows' largest.

    Raises:
        WeightError: a tensor is missing, has another size, or does not belong to the format.
    """
    import torch

    weight = f"{module}.weight"
    state = next((key for table in TABLES if (key := weight + STATE + table) in tensors), None)
    if state is not None:
        return _four_bits(weight, _state(state, tensors), tensors)
    stored = tensors.get(weight)
    if stored is not None and stored.dtype == torch.int8:
        return _eight_bits(module, tensors)
    if stored is not None and stored.dtype == torch.uint8:
        required_tensor(tensors, weight + STATE + TABLES[0])  # codes without their state
    return None


def _state(key: str, tensors: Mapping[str, Weight]) -> dict[str, Any]:
    """The `quant_state` of a weight: `table`, `block_size`, `rows`, `columns`, `double` and `offset`."""
    try:
        state = json.loads(tensors[key].load().numpy().tobytes())
        table, block_size = state["quant_type"], int(state["blocksize"])
        rows, columns = map(int, state["shape"])
        nested = state.get("nested_blocksize")
        offset = float(state["nested_offset"]) if nested else 0.0
    except (ValueError, KeyError, TypeError) as error:
        raise WeightError(f"{key}: broken, expected a JSON object of bitsandbytes ({error!r})") from None
    if nested not in (None, NESTED):
        raise WeightError(f"{key}: scales share a scale in blocks of {nested}, expected {NESTED}")
    return {
        "table": table,
        "block_size": block_size,
        "rows": rows,
        "columns": columns,
        "double": bool(nested),
        "offset": offset,
    }


def _four_bits(weight: str, state: Mapping[str, Any], tensors: Mapping[str, Weight]) -> PackedMatrix:
    import torch

    rows, columns, double = state["rows"], state["columns"], state["double"]
    options = {"block_size": state["block_size"], "double": double}
    scheme = SCHEMES[state["table"]](**options)
    constants, stored = scheme.constants(), scheme.stored(rows, columns)
    module = weight.removesuffix(".weight")

    def checked(suffix: str, table: Tensor, codes: Weight) -> Tensor:
        if not torch.equal(required_tensor(tensors, weight + suffix).load(), table):
            raise WeightError(
                f"{weight + suffix}: another table than {scheme.name} has, so its codes mean something else"
            )
        return codes.load()

    packed = required_tensor(tensors, weight)
    if packed.nbytes != stored["codes"].shape[0]:
        raise WeightError(f"{weight} takes {packed.nbytes} bytes, expected {stored['codes'].shape[0]}")
    absmax = required_tensor(
        tensors, f"{weight}.absmax", stored["absmax_codes" if double else "absmax"].shape
    )

    def codes() -> Tensor:
        # stored in any dtype, as `bnb_4bit_quant_storage` says
        return checked(".quant_map", constants["table"], packed).contiguous().view(torch.uint8).flatten()

    parts: dict[str, Callable[[], Tensor]] = {"codes": codes}
    if not double:
        return PackedMatrix(scheme, rows, columns, {**parts, "absmax": absmax.load}, module)
    scales = required_tensor(tensors, f"{weight}.nested_absmax", stored["absmax_scales"].shape)
    parts |= {
        "absmax_codes": lambda: checked(".nested_quant_map", constants["nested_table"], absmax),
        "absmax_scales": scales.load,
        "absmax_offset": lambda: torch.tensor(state["offset"], dtype=torch.float32),
    }
    return PackedMatrix(scheme, rows, columns, parts, module)


def _eight_bits(module: str, tensors: Mapping[str, Weight]) -> PackedMatrix:
    weight = tensors[f"{module}.weight"]
    rows, columns = weight.shape
    largest = required_tensor(tensors, f"{module}.SCB", (rows,))

    def codes() -> Tensor:
        return (weight.load().short() + 128).byte().unsqueeze(1)

    def scales() -> Tensor:
        return (largest.load().float() / LARGEST).reshape(rows, 1)

    return PackedMatrix(SCHEMES["int8"](), rows, columns, {"codes": codes, "scales": scales}, module)
