"""Hugging Face checkpoints that another library has quantized: what stays in bits, and what is not there at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adaptc.checkpoints.huggingface import CONFIG, converted, spellings, tensors_of
from adaptc.errors import WeightError
from adaptc.quantization.packed import PackedMatrix, PackedWeight
from adaptc.quantization.readers import READERS
from adaptc.weights import Held, Weight, seeded

WEIGHT = ".weight"


def packed_weights(model: nn.Module, directory: Path, about: Mapping[str, Any]) -> dict[str, PackedWeight]:
    """The weights that a checkpoint holds in another library's bits, under the model's names.

    Args:
        model: whose parameters are fake.
        directory: the checkpoint.
        about: its `quantization_config`.

    Raises:
        WeightError: nobody reads that library's format, or what is stored does not fit the model.
    """
    method = str(about.get("quant_method"))
    readers = READERS
    if method not in readers:
        raise WeightError(
            f"{directory} is quantized by {method!r}, which adaptc does not read; it reads {', '.join(sorted(readers))}"
        )
    stored = tensors_of(directory)
    if converted(model, stored):
        raise WeightError(
            f"{directory} is quantized by {method}, and transformers converts its tensors as it loads them, "
            "which adaptc cannot follow in bits",
            "start from the float checkpoint, and let `quantize` store it in few bits",
        )
    found: dict[str, PackedWeight] = {}
    for name, keys in spellings(model).items():
        for key in keys:
            bits = readers[method](about, key.removesuffix(WEIGHT), stored) if name.endswith(WEIGHT) else None
            if bits is not None:
                found[name] = _packed(model, name, bits)
                break
    return found


def _packed(model: nn.Module, name: str, bits: PackedMatrix) -> PackedWeight:
    parameter = model.get_parameter(name)
    shape = tuple(parameter.shape)
    owner = model.get_submodule(name.removesuffix(WEIGHT))
    flipped = type(owner).__name__ == "Conv1D"  # transformers' own, (in, out); what packs it transposes it
    size = (bits.rows, bits.columns)
    if shape != (size[::-1] if flipped else size):
        raise WeightError(
            f"{name} is stored as a matrix {list(size)}, but {CONFIG} describes {list(shape)}; the files and the "
            "configuration belong to different models"
        )
    refused = bits.scheme.refuses(*size)
    if refused:
        raise WeightError(
            f"{name} is stored as {bits.scheme.text}: {'.'.join(refused.option)}: {refused.reason}"
        )
    return PackedWeight(bits, shape, parameter.dtype, flipped)


def missing(model: nn.Module, directory: Path, packed: Mapping[str, Weight]) -> list[str]:
    """The parameters that a checkpoint does not hold."""
    stored = tensors_of(directory)
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    return [
        name
        for name, keys in spellings(model).items()
        if name not in buffers and name not in packed and not any(key in stored for key in keys)
    ]


def initialised(model: Any, names: list[str], seed: int) -> dict[str, Weight]:
    """Parameters as transformers initialises them: a new head, or what else a checkpoint does not hold."""
    found: dict[str, Weight] = {}
    for owner_name in dict.fromkeys(name.rpartition(".")[0] for name in names):
        owner = model.get_submodule(owner_name)
        fake = dict(owner._parameters)
        for key, parameter in fake.items():
            if parameter is not None:
                owner._parameters[key] = nn.Parameter(torch.zeros(parameter.shape, dtype=parameter.dtype))
        with torch.random.fork_rng(devices=[]):
            torch.random.set_rng_state(seeded(seed, owner_name).get_state())
            model._init_weights(owner)
        for key, parameter in owner._parameters.items():
            if parameter is not None and f"{owner_name}.{key}" in names:
                found[f"{owner_name}.{key}"] = Held(parameter.detach())
        owner._parameters.update(fake)
    return found
