"""ONNX Runtime: sessions that run an ONNX program on the CPU."""

# pyright: reportMissingTypeStubs=false
# ONNX Runtime has no types.

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from adaptc.errors import AdaptcError
from adaptc.rewriter.cache.signature import PAST_PREFIX, present_of


def onnx_runner(
    path: Path, shown: Path | None = None, exact: bool = False
) -> Callable[[Mapping[str, torch.Tensor]], Sequence[torch.Tensor]]:
    """A function that runs an ONNX file in ONNX Runtime, on one thread that does not spin.

    Args:
        path: the file.
        shown: the path that an error names, if not the file's own.
        exact: do not round activations, where standard operations on quantized weights are fused.

    Returns:
        A function of named tensors, of which the program takes those it has, to its outputs.

    Raises:
        AdaptcError: ONNX Runtime does not take the program.
    """
    return session_call(open_session(path, shown=shown, exact=exact))


def session_call(
    session: Any, adapter: Path | Mapping[str, torch.Tensor] | None = None
) -> Callable[[Mapping[str, torch.Tensor]], Sequence[torch.Tensor]]:
    """A function that runs a session on named tensors, of which the program takes those it has, to its outputs.

    Args:
        session: the session.
        adapter: what every call replaces of the program's weights: an `.onnx_adapter` file, or tensors by name.
    """
    import onnxruntime

    untyped: Any = onnxruntime
    names = {value.name for value in session.get_inputs()}
    options, loaded, fed = None, untyped.LoraAdapter(), {}
    if isinstance(adapter, Path):
        loaded.Load(str(adapter))
        options = untyped.RunOptions()
        options.add_active_adapter(loaded)
    elif adapter is not None:
        fed = {name: as_array(tensor) for name, tensor in adapter.items()}

    def call(tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        assert loaded  # options do not keep it alive, and without it a run gives the base's outputs
        feeds = {name: as_array(tensor) for name, tensor in tensors.items() if name in names}
        return [torch.as_tensor(array) for array in session.run(None, feeds | fed, options)]

    return call


def buffer_runner(
    path: Path, shown: Path | None = None
) -> Callable[[Mapping[str, torch.Tensor]], Sequence[torch.Tensor]]:
    """A function that runs an ONNX file whose keys and values stay in buffers, as onnxruntime-genai runs it.

    The buffer that an input `past_key_values.0.key` is given in is the output `present.0.key` too.

    Raises:
        AdaptcError: ONNX Runtime does not take the program.
    """
    import onnxruntime

    untyped: Any = onnxruntime
    session = open_session(path, shown=shown)
    inputs = [value.name for value in session.get_inputs()]
    outputs = [value.name for value in session.get_outputs()]
    past_of = {present_of(name): name for name in inputs if name.startswith(PAST_PREFIX)}

    def call(tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        given = {name: untyped.OrtValue.ortvalue_from_numpy(as_array(tensors[name])) for name in inputs}
        binding = session.io_binding()
        for name, value in given.items():
            binding.bind_ortvalue_input(name, value)
        for name in outputs:
            if name in past_of:
                binding.bind_ortvalue_output(name, given[past_of[name]])
            else:
                binding.bind_output(name)
        session.run_with_iobinding(binding)
        return [torch.tensor(value.numpy()) for value in binding.get_outputs()]  # the memory is the binding's

    return call


def as_array(tensor: torch.Tensor) -> Any:
    """A tensor as an array for ONNX Runtime, in float32 instead of bfloat16 as in the program."""
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
        model: a file, or the bytes of a part of one.
        threads: how many threads compute.
        shown: the path that an error names.
        beside: the folder of a part's data file; the session then uses as little memory as possible.
        exact: do not round activations, where standard operations on quantized weights are fused.

    Raises:
        AdaptcError: ONNX Runtime does not take the program.
    """
    import onnxruntime

    untyped: Any = onnxruntime
    options = untyped.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # without it, sums of products of 8-bit numbers saturate on processors without VNNI
    options.add_session_config_entry("session.x64quantprecision", "1")
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
        return untyped.InferenceSession(
            given, options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled
        )
    except Exception as error:
        raise AdaptcError(f"{shown or model}: ONNX Runtime does not take it: {error}") from error
