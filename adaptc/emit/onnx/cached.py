"""An ONNX program with a cache says what it takes and gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import onnx

from adaptc.inputs import InputSpec
from adaptc.rewriter.cache.signature import CacheSignature

NEW_TOKENS = "adaptc.cache"
"""The key in the metadata of a program with a cache: its value is the name of the dimension of the new tokens."""

COUNTED = "adaptc.padding"
"""The key in the metadata of a program that takes sequences padded on the right alone; its value is `right`."""


def read_signature(path: Path) -> CacheSignature | None:
    """What a program with a cache takes and gives; None where it has no cache."""
    model: Any = cast(Any, onnx).load(path, format="protobuf", load_external_data=False)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    if NEW_TOKENS not in metadata:
        return None
    inputs = tuple(InputSpec(value.name, _dtype(value), _dims(value)) for value in model.graph.input)
    outputs = {value.name: _dims(value) for value in model.graph.output}
    return CacheSignature(inputs, outputs, metadata[NEW_TOKENS], COUNTED in metadata)


def _dtype(value: Any) -> str:
    dtype: Any = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
    return str(dtype)


def _dims(value: Any) -> tuple[str | int, ...]:
    return tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)
