"""The weights of a Hugging Face directory under a model's own names; their data is not read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from adaptc.errors import WeightError
from adaptc.ir.nodes import set_tensor
from adaptc.optional import optional
from adaptc.weights import Held, Stored, Weight, read_safetensors

CONFIG = "config.json"
QUANTIZED_KEYS = (".qweight", ".SCB", ".absmax")
"""The endings of keys that only quantized checkpoints have."""


def first_names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter or buffer -> the first name of the same tensor."""
    firsts: dict[int, str] = {}
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: firsts.setdefault(id(tensor), name) for name, tensor in tensors}


def stored_weights(
    model: nn.Module, directory: Path, given: Mapping[str, Weight]
) -> dict[str, Weight] | None:
    """Find the weights of a model in a checkpoint.

    Args:
        model: the model; its parameters are fake.
        directory: the checkpoint.
        given: weights by the model's names that are not looked for in the checkpoint.

    Returns:
        Name -> weight, for every parameter and buffer; None where transformers must convert tensors of the
        checkpoint, or initialise tensors that it does not hold.

    Raises:
        WeightError: a file is missing or broken, a tensor has another shape than the configuration says, or the
            checkpoint is quantized and the configuration does not say how.
    """
    stored = stored_tensors(directory)
    if is_converted(model, stored):
        _check_floats(stored, directory)
        return None
    buffers = dict(model.named_buffers(remove_duplicate=False))
    weights: dict[str, Weight] = {}
    for name, keys in spellings(model).items():
        tensor = model.get_parameter(name) if name not in buffers else buffers[name]
        if name in buffers and not isinstance(tensor, FakeTensor):
            weights[name] = Held(tensor)
            continue
        if name in given:
            weights[name] = given[name]
            continue
        source = next((stored[key] for key in keys if key in stored), None)
        if source is None:
            _check_floats(stored, directory)
            return None
        if source.shape != tuple(tensor.shape):
            raise WeightError(
                f"{source.file}: tensor {source.key!r} has shape {list(source.shape)}, but {CONFIG} describes "
                f"{list(tensor.shape)} for {name}; the file and the configuration belong to different models"
            )
        if tensor.dtype.is_floating_point and not source.dtype.is_floating_point:
            raise WeightError(
                f"{source.file}: tensor {source.key!r} holds {source.dtype}, not the floats of {name}: the checkpoint "
                f"is quantized, and {CONFIG} has no quantization_config that says how"
            )
        dtype = tensor.dtype if tensor.dtype.is_floating_point else source.dtype
        weights[name] = Stored(source.file, source.key, source.shape, dtype)
    return weights


def spellings(model: nn.Module) -> dict[str, list[str]]:
    """Every name of a parameter or buffer -> its keys in a checkpoint: any alias, with the base's prefix or without."""
    prefix = getattr(model, "base_model_prefix", "") + "."
    firsts = first_names(model)
    keys: dict[str, list[str]] = {}
    for name, first in firsts.items():
        keys.setdefault(first, []).extend((name, name.removeprefix(prefix), prefix + name))
    return {name: list(dict.fromkeys([name, *keys[first]])) for name, first in firsts.items()}


def _check_floats(stored: Iterable[str], directory: Path) -> None:
    """Check that a checkpoint which transformers loads is not quantized: it would initialise those weights anew.

    Raises:
        WeightError: it holds part of a quantized weight.
    """
    packed = next((key for key in stored if key.endswith(QUANTIZED_KEYS)), None)
    if packed is not None:
        raise WeightError(
            f"{directory} holds {packed}, bits of a quantized weight, and {CONFIG} has no quantization_config"
        )


def _shards(index: Path) -> list[str]:
    """The file names in an index.

    Raises:
        WeightError: the index is broken.
    """
    try:
        names = {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightError(f"{index}: broken, expected a JSON object with a weight_map ({error!r})") from None
    return sorted(names)


def untie_as_stored(model: nn.Module, directory: Path) -> list[str]:
    """Give tied parameters tensors of their own where the checkpoint holds different values for them.

    transformers' `from_pretrained` does the same: there the configuration is wrong, not the checkpoint.

    Returns:
        A note for each parameter that is no longer tied.
    """
    notes: list[str] = []
    try:
        stored = stored_tensors(directory)
    except WeightError:
        return notes  # a plan needs no weights; the error is raised when they are loaded
    for name, first in first_names(model).items():
        if name == first or name not in stored or first not in stored:
            continue
        tied, other = stored[first], stored[name]
        if tied.shape != other.shape or not torch.equal(tied.load(), other.load()):
            set_tensor(model, name, nn.Parameter(torch.empty_like(model.get_parameter(first))))
            notes.append(
                f"{name} is not tied to {first}, as the configuration says: the checkpoint holds both"
            )
    return notes


def stored_tensors(directory: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint by its key, from one file or several shards.

    Raises:
        WeightError: a file or the index is missing or broken.
    """
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        names = _shards(index)
    else:
        names = ["model.safetensors"] if (directory / "model.safetensors").is_file() else []
    stored: dict[str, Stored] = {}
    for name in names:
        stored |= read_safetensors(directory / name)
    return stored


def is_converted(model: object, stored: Iterable[str]) -> bool:
    """Whether transformers computes some of a model's tensors from the checkpoint's, beyond giving them other names."""
    mapping, loading = (
        optional("transformers.conversion_mapping"),
        optional("transformers.core_model_loading"),
    )
    conversions: Iterable[Any] = mapping.get_model_conversion_mapping(model, add_legacy=False)
    patterns = [
        pattern
        for conversion in conversions
        if isinstance(conversion, loading.WeightConverter)
        for pattern in conversion.source_patterns
    ]
    return any(re.search(pattern, key) for pattern in patterns for key in stored)
