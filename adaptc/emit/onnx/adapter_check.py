"""Whether an `.onnx_adapter` file fits a program: ONNX Runtime does not look. No torch is imported."""

# pyright: reportMissingTypeStubs=false
# ONNX Runtime has no types.

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import onnx

from adaptc.errors import AdaptcError, WeightError

BASE = "adaptc.base_sha256"
"""The key in a program's metadata: its value is the hash of its base's weights."""
BITS = 31
"""How many bits of a base's hash fit into the number that a file has for its model."""
ADVICE = "make it for this program: adaptc adapter PROGRAM ADAPTER -o x.onnx_adapter"


def base_number(base_sha256: str) -> int:
    """The first bits of a base's hash, as the number of a model."""
    return int(base_sha256, 16) >> (4 * len(base_sha256) - BITS)


def check_adapter(adapter: Path, program: Path) -> None:
    """Check that an adapter was made for a program.

    Args:
        adapter: an `.onnx_adapter` file.
        program: an ONNX program with `adapters: swap`.

    Raises:
        WeightError: it is no such file, was made for another base, or has a tensor that the program does not take.
        AdaptcError: the program takes no adapters.
    """
    model: Any = cast(Any, onnx).load(program, format="protobuf", load_external_data=False)
    weights = {weight.name for weight in model.graph.initializer}
    places = {value.name: _dims(value) for value in model.graph.input if value.name in weights}
    if not places:
        raise AdaptcError(f"{program} takes no adapters", "emit it with `adapters: swap`")
    file = read_file(adapter)
    base = next((item.value for item in model.metadata_props if item.key == BASE), "")
    if base and file.get_model_version() != base_number(base):
        raise WeightError(f"{adapter}: made for another base than that of {program}", ADVICE)
    for name, value in file.get_parameters().items():
        if not _fits(places.get(name), value.shape()):
            shown = "x".join(map(str, value.shape()))
            raise WeightError(f"{adapter}: {program} has no place for {name} {shown}", ADVICE)


def read_file(adapter: Path) -> Any:
    """An `.onnx_adapter` file as ONNX Runtime reads it.

    Raises:
        WeightError: it is no such file.
    """
    import onnxruntime

    untyped: Any = onnxruntime
    if not adapter.is_file():
        raise WeightError(f"{adapter}: no such file; expected an .onnx_adapter file")
    try:
        return untyped.AdapterFormat.read_adapter(str(adapter))
    except Exception as error:
        raise WeightError(f"{adapter}: no adapter that ONNX Runtime reads: {error}") from error


def _dims(value: Any) -> list[int | str]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def _fits(place: Sequence[int | str] | None, shape: Sequence[int]) -> bool:
    """Whether a tensor has the sizes of a place; any where the place has a name."""
    if place is None or len(place) != len(shape):
        return False
    return all(isinstance(a, str) or a == b for a, b in zip(place, shape, strict=True))
