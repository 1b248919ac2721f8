"""`.onnx_adapter` files: an adapter's tensors as ONNX Runtime loads them beside a program."""

# pyright: reportMissingTypeStubs=false
# ONNX Runtime has no types.

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from adaptc.emit.onnx.adapter_check import base_number, read_file
from adaptc.emit.onnx.runtime import as_array

VERSION = 1
"""The version of what adaptc writes into these files."""


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


def read_adapter(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of an `.onnx_adapter` file by name.

    Raises:
        WeightError: it is no such file.
    """
    parameters = read_file(path).get_parameters()
    return {name: torch.as_tensor(value.numpy().copy()) for name, value in parameters.items()}
