"""An ONNX program with a cache says what it takes and gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import onnx

from adaptc.inputs import InputSpec
from adaptc.rewriter.cache.signature import CacheSignature

NEW_TOKENS = "adaptc.cache"
"""The key in the metadata of a program with a cache: its value is the name of the dimension of the new tokens."""
ENCODER = "adaptc.encoder"
"""The key in the metadata of a decoder: its value is the name of the file, beside it, of its encoder."""


LONGEST = "adaptc.longest_text"
"""The key in the metadata of a decoder with tables of positions: its value is how many tokens they have places for."""


def read_longest(path: Path) -> int | None:
    """How many tokens a program can read at most; None where it has no such table."""
    metadata = {entry.key: entry.value for entry in _read(path).metadata_props}
    return int(metadata[LONGEST]) if LONGEST in metadata else None


def encoder_beside(path: Path) -> Path:
    """Where the encoder of a decoder is written: `model.encoder.onnx` beside `model.onnx`."""
    return path.with_name(f"{path.stem}.encoder{path.suffix}")


def read_outputs(path: Path) -> list[str]:
    """The names of a program's outputs."""
    return [value.name for value in _read(path).graph.output]


COUNTED = "adaptc.padding"
"""The key in the metadata of a program that takes sequences padded on the right alone; its value is `right`."""


def read_signature(path: Path) -> CacheSignature | None:
    """What a program with a cache takes and gives; None where it has no cache."""
    model = _read(path)
    metadata: dict[str, str] = {entry.key: entry.value for entry in model.metadata_props}
    new = metadata.get(NEW_TOKENS)
    if new is None:
        return None
    outputs = {value.name: _dims(value) for value in model.graph.output}
    return CacheSignature(_inputs(model), outputs, new, metadata.get(ENCODER), COUNTED in metadata)


def read_inputs(path: Path) -> tuple[InputSpec, ...]:
    """What a program takes, without weights that a call may replace."""
    return _inputs(_read(path))


def _inputs(model: Any) -> tuple[InputSpec, ...]:
    weights = {weight.name for weight in model.graph.initializer}
    given = [value for value in model.graph.input if value.name not in weights]
    return tuple(InputSpec(value.name, _dtype(value), _dims(value)) for value in given)


def _read(path: Path) -> Any:
    """A program without the content of its data file."""
    return cast(Any, onnx).load(path, format="protobuf", load_external_data=False)


def _dtype(value: Any) -> str:
    dtype: Any = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
    return str(dtype)


def _dims(value: Any) -> tuple[str | int, ...]:
    return tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)
