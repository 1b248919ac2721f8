"""bitsandbytes: matrices in four bits with a table, or in eight with a scale for each row."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from adaptc.errors import WeightError
from adaptc.quantization.codebook import NESTED
from adaptc.quantization.packed import PackedMatrix
from adaptc.quantization.readers import needed, stored_by
from adaptc.quantization.scheme import SCHEMES
from adaptc.weights import Weight

if TYPE_CHECKING:
    from torch import Tensor

STATE = ".quant_state.bitsandbytes__"
KINDS = ("nf4", "fp4")
"""The tables that it has, as our schemes are called."""
LARGEST = 127
"""The code of a row's largest value."""


@stored_by("bitsandbytes")
def bitsandbytes(about: Mapping[str, Any], module: str, tensors: Mapping[str, Weight]) -> PackedMatrix | None:
    """`weight`, `weight.absmax` and a `weight.quant_state` in JSON; or int8 `weight` and `SCB`, its rows' largest."""
    import torch

    weight = f"{module}.weight"
    found = next((key for kind in KINDS if (key := weight + STATE + kind) in tensors), None)
    if found is not None:
        return _four(weight, _state(found, tensors), tensors)
    held = tensors.get(weight)
    if held is not None and held.dtype == torch.int8:
        return _eight(module, tensors)
    if held is not None and held.dtype == torch.uint8:
        needed(tensors, weight + STATE + KINDS[0])
    return None


def _state(key: str, tensors: Mapping[str, Weight]) -> dict[str, Any]:
    try:
        state = json.loads(bytes(tensors[key].load().tolist()))
        known = {"kind": state["quant_type"], "block_size": int(state["blocksize"])}
        rows, columns = map(int, state["shape"])
        nested = state.get("nested_blocksize")
        offset = float(state["nested_offset"]) if nested else 0.0
    except (ValueError, KeyError, TypeError) as error:
        raise WeightError(f"{key}: broken, expected a JSON object of bitsandbytes ({error!r})") from None
    if nested not in (None, NESTED):
        raise WeightError(f"{key}: scales share a scale in blocks of {nested}, expected {NESTED}")
    return known | {"rows": rows, "columns": columns, "double": bool(nested), "offset": offset}


def _four(weight: str, state: Mapping[str, Any], tensors: Mapping[str, Weight]) -> PackedMatrix:
    import torch

    rows, columns, double = state["rows"], state["columns"], state["double"]
    scheme = SCHEMES[state["kind"]](block_size=state["block_size"], double=double)  # type: ignore[call-arg]
    constants, stored = scheme.constants(), scheme.stored(rows, columns)
    module = weight.removesuffix(".weight")

    def checked(suffix: str, table: Tensor, held: Weight) -> Tensor:
        if not torch.equal(needed(tensors, weight + suffix).load(), table):
            raise WeightError(
                f"{weight + suffix}: another table than {scheme.name} has, so its codes mean something else"
            )
        return held.load()

    packed = needed(tensors, weight)
    if packed.nbytes != stored["codes"].shape[0]:
        raise WeightError(f"{weight} takes {packed.nbytes} bytes, expected {stored['codes'].shape[0]}")
    absmax = needed(tensors, f"{weight}.absmax", stored["absmax_codes" if double else "absmax"].shape)
    parts: dict[str, Any] = {  # the bytes may be stored as numbers of more than one
        "codes": lambda: (
            checked(".quant_map", constants["table"], packed).contiguous().view(torch.uint8).flatten()
        )
    }
    if not double:
        return PackedMatrix(scheme, rows, columns, {**parts, "absmax": absmax.load}, module)
    scales = needed(tensors, f"{weight}.nested_absmax", stored["absmax_scales"].shape)
    parts |= {
        "absmax_codes": lambda: checked(".nested_quant_map", constants["nested_table"], absmax),
        "absmax_scales": scales.load,
        "absmax_offset": lambda: torch.tensor(state["offset"], dtype=torch.float32),
    }
    return PackedMatrix(scheme, rows, columns, parts, module)


def _eight(module: str, tensors: Mapping[str, Weight]) -> PackedMatrix:
    weight = tensors[f"{module}.weight"]
    rows, columns = weight.shape
    largest = needed(tensors, f"{module}.SCB", (rows,))

    def codes() -> Tensor:
        return (weight.load().short() + 128).byte().unsqueeze(1)

    def scales() -> Tensor:
        return (largest.load().float() / LARGEST).reshape(rows, 1)

    return PackedMatrix(SCHEMES["int8"](), rows, columns, {"codes": codes, "scales": scales}, module)
