"""ONNX: exported without weights, weights attached by name, tidied without reading one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from adaptc.errors import AdaptcError


def onnx_runner(
    path: Path, shown: Path | None = None, exact: bool = False
) -> Callable[[Mapping[str, torch.Tensor]], Sequence[torch.Tensor]]:
    """Run an ONNX file in ONNX Runtime, on one thread that does not spin; `exact`: activations are not rounded."""
    session = open_session(path, shown=shown, exact=exact)
    names = {value.name for value in session.get_inputs()}

    def call(tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        feeds = {name: as_array(tensor) for name, tensor in tensors.items() if name in names}
        return [torch.from_numpy(array) for array in session.run(None, feeds)]

    return call


def as_array(tensor: torch.Tensor) -> Any:
    """A tensor as ONNX Runtime takes it: bfloat16 inputs are float32 in a program."""
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def open_session(
    model: Path | bytes,
    threads: int = 1,
    shown: Path | None = None,
    beside: Path | None = None,
    exact: bool = False,
) -> Any:
    """An ONNX Runtime session on the CPU.

    Args:
        model: a file, or a part of one.
        threads: that it computes with.
        shown: what an error calls the file.
        beside: the folder of a part's weights; it is then run with as little memory as can be.
        exact: do not round activations where standard operations on quantized weights are fused.

    Raises:
        AdaptcError: ONNX Runtime does not take the program.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if exact:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    disabled = None
    if beside is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(beside))
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
        disabled = ["ConstantFolding"]  # it would hold a weight and its transpose
    given = str(model) if isinstance(model, Path) else model
    try:
        return onnxruntime.InferenceSession(
            given, options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled
        )
    except Exception as error:
        raise AdaptcError(f"{shown or model}: ONNX Runtime does not take it: {error}") from error
