"""`.onnx_adapter` files: an adapter's tensors as ONNX Runtime loads them beside a program."""

# pyright: reportMissingTypeStubs=false
# ONNX Runtime has no types.

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from adaptc.emit.onnx.runtime import as_array
from adaptc.errors import WeightError

VERSION = 1
"""The version of what adaptc writes into these files."""
BITS = 31
"""How many bits of a base's hash fit into the number that a file has for its model."""


def write_adapter(path: Path, tensors: Mapping[str, torch.Tensor], base_sha256: str) -> None:
    """Write an adapter's tensors, named as the program's inputs; the file says by `base_number` which base they fit."""
    import onnxruntime

    untyped: Any = onnxruntime
    values = {
        name: untyped.OrtValue.ortvalue_from_numpy(as_array(t.contiguous())) for name, t in tensors.items()
    }
    file = untyped.AdapterFormat()
    file.set_adapter_version(VERSION)
    file.set_model_version(base_number(base_sha256))
    file.set_parameters(values)
    file.export_adapter(str(path))


def base_number(base_sha256: str) -> int:
    """The first bits of a base's hash, as the number of a model."""
    return int(base_sha256, 16) >> (4 * len(base_sha256) - BITS)


def read_adapter(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of an `.onnx_adapter` file by name.

    Raises:
        WeightError: it is no such file.
    """
    import onnxruntime

    untyped: Any = onnxruntime
    try:
        parameters = untyped.AdapterFormat.read_adapter(str(path)).get_parameters()
    except Exception as error:
        raise WeightError(f"{path}: no adapter that ONNX Runtime reads: {error}") from error
    return {name: torch.as_tensor(value.numpy().copy()) for name, value in parameters.items()}
