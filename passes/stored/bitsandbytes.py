"""bitsandbytes: matrices in four bits with a table, or in eight with a scale for each row."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from adaptc.errors import WeightError
from adaptc.packed import Bits, stored_by
from adaptc.registry import load_schemes
from adaptc.table_blocks import NESTED
from adaptc.weights import Weight

if TYPE_CHECKING:
    from torch import Tensor

STATE = ".quant_state.bitsandbytes__"
LARGEST = 127
"""The code of a row's largest value."""


@stored_by("bitsandbytes")
def bitsandbytes(about: Mapping[str, Any], module: str, tensors: Mapping[str, Weight]) -> Bits | None:
    """`weight`, `weight.absmax` and a `weight.quant_state` in JSON; or int8 `weight` and `SCB`, its rows' largest."""
    weight = f"{module}.weight"
    state = next((key for key in tensors if key.startswith(weight + STATE)), None)
    if state is not None:
        return _four(weight, json.loads(bytes(tensors[state].load().tolist())), tensors)
    return _eight(module, tensors) if f"{module}.SCB" in tensors else None


def _four(weight: str, state: Mapping[str, Any], tensors: Mapping[str, Weight]) -> Bits:
    import torch

    rows, columns = state["shape"]
    double = "nested_blocksize" in state
    if double and state["nested_blocksize"] != NESTED:
        raise WeightError(
            f"{weight}: its scales share a scale in blocks of {state['nested_blocksize']}, expected {NESTED}"
        )
    scheme = load_schemes()[state["quant_type"]](block_size=state["blocksize"], double=double)  # type: ignore[call-arg]
    constants = scheme.constants()

    def checked(suffix: str, table: Tensor, part: str) -> Tensor:
        if not torch.equal(tensors[weight + suffix].load(), table):
            raise WeightError(
                f"{weight + suffix}: another table than {scheme.name} has, so its codes mean something else"
            )
        return tensors[weight + part].load()

    def codes() -> Tensor:  # the bytes may be stored as numbers of more than one
        return checked(".quant_map", constants["table"], "").contiguous().view(torch.uint8).flatten()

    if not double:
        return Bits(scheme, rows, columns, {"codes": codes, "absmax": tensors[f"{weight}.absmax"].load})
    nested = {
        "absmax_codes": lambda: checked(".nested_quant_map", constants["nested_table"], ".absmax"),
        "absmax_scales": tensors[f"{weight}.nested_absmax"].load,
        "absmax_offset": lambda: torch.tensor(state["nested_offset"], dtype=torch.float32),
    }
    return Bits(scheme, rows, columns, {"codes": codes} | nested)


def _eight(module: str, tensors: Mapping[str, Weight]) -> Bits:
    weight, largest = tensors[f"{module}.weight"], tensors[f"{module}.SCB"]
    rows, columns = weight.shape

    def codes() -> Tensor:
        return (weight.load().short() + 128).byte().unsqueeze(1)

    def scales() -> Tensor:
        return (largest.load().float() / LARGEST).unsqueeze(1)

    return Bits(load_schemes()["int8"](), rows, columns, {"codes": codes, "scales": scales})
