"""Hugging Face bases: a directory or hub id, any task with an Auto class, weights left on disk."""

# The tensors of a module are replaced in torch's own dicts: its setters refuse fake tensors, or register them anew.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from adaptc.checkpoints.huggingface_weights import stored_weights, untie_as_stored
from adaptc.errors import TraceError, WeightError
from adaptc.inputs import InputSpec
from adaptc.ir.base import Base, Bound, Pretrained
from adaptc.optional import optional
from adaptc.spec.base import BaseEntry
from adaptc.tracing.computed_buffers import compute_buffers
from adaptc.tracing.constants import base_with_constants
from adaptc.tracing.huggingface.heads import heads_of
from adaptc.tracing.huggingface.inputs import chosen_inputs
from adaptc.tracing.huggingface.processor import given_inputs
from adaptc.tracing.huggingface.settings import alternative_notes, set_for_tracing
from adaptc.tracing.huggingface.tasks import auto_class
from adaptc.tracing.missing_parameters import drawing_from, initialised, missing_parameters
from adaptc.tracing.module import held_weights
from adaptc.tracing.quantized_checkpoint import packed_weights
from adaptc.tracing.sentence_embedding import SentenceEmbedding, left_out_notes
from adaptc.weights import Weight


def load(model: str, entry: BaseEntry, seed: int, inputs: tuple[InputSpec, ...]) -> Base:
    """Build a Hugging Face base whose parameters are fake; its weights are found when they are first asked for.

    Args:
        model: a directory, or a hub id.
        entry: the spec's `base`: its task, its dtype, and what overrides the configuration.
        seed: initialises the weights that the checkpoint does not hold.
        inputs: the inputs of the spec; derived from the configuration where it names none.

    Raises:
        TraceError: the configuration cannot be read, has no such task, or its inputs cannot be derived.
        WeightError: the checkpoint is quantized in a format that adaptc does not read.
    """
    pretrained = read_pretrained(model, entry.task, entry.trust_remote_code, entry.config)
    auto, config = pretrained.auto, pretrained.config
    whole = auto if isinstance(auto, SentenceEmbedding) else None
    directory = Path(pretrained.transformer)
    dtype = entry.dtype or str(config.dtype).removeprefix("torch.")
    config.dtype = getattr(torch, dtype)
    quantization = _take_quantization(config)
    pretrained = replace(pretrained, config=copy.deepcopy(config))
    notes = set_for_tracing(config)
    module = _on_meta(model, entry, auto, config)
    notes += alternative_notes(module)
    notes += left_out_notes(directory) if auto is optional("transformers").AutoModel else []
    files = tuple(sorted(directory.glob("*.safetensors"))) if directory.is_dir() else ()
    notes += untie_as_stored(module, directory) if files else []
    fake_parameters(module)

    packed = packed_weights(module, directory, quantization) if quantization and files else {}
    if quantization and not files:
        notes.append(
            f"quantized by {quantization['quant_method']}, and its files are not here: planned as floats"
        )

    given, unread = given_inputs(pretrained.transformer, entry.trust_remote_code)
    derived = chosen_inputs(module, config, inputs, given, whole.inputs(module) if whole else ())
    notes += unread

    def find() -> Bound:
        others: dict[str, Weight] = dict(whole.weights(module)) if whole else {}
        if quantization:
            return _quantized_weights(module, directory, packed | others, seed)
        stored = stored_weights(module, directory, others) if files else None
        return Bound(stored) if stored else pretrained_weights(replace(pretrained, config=config), seed)

    base = Base(
        describe=f"{model} ({type(module).__name__}, {dtype})",
        model=module,
        find=find,
        heads=heads_of(module) | (whole.heads(module) if whole else set[str]()),
        inputs=derived.inputs,
        files=files,
        packed=packed,
        notes=notes,
        pretrained=pretrained,
        left_out=derived.left_out,
    )
    return base_with_constants(base, derived.constants, derived.notes)


def _on_meta(model: str, entry: BaseEntry, auto: Any, config: Any) -> nn.Module:
    """The model of a configuration, without memory for its tensors.

    Raises:
        TraceError: transformers makes none.
    """
    try:
        with torch.device("meta"):
            return auto.from_config(config, dtype=config.dtype, trust_remote_code=entry.trust_remote_code)
    except (ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise TraceError(f"{model} cannot be loaded for task {entry.task!r}: {reason}") from error


def read_pretrained(model: str, task: str, trust: bool, overrides: Mapping[str, object]) -> Pretrained:
    """Read what a checkpoint is: its configuration, and what makes the model of a task.

    Args:
        model: a directory, or a hub id.
        task: the task.
        trust: whether code that comes with it may be run.
        overrides: what overrides its configuration.

    Raises:
        TraceError: the configuration cannot be read, or the directory is not one of this task.
    """
    auto = auto_class(task, model)
    folders, stated = (
        (auto.folders, auto.files.config) if isinstance(auto, SentenceEmbedding) else ({"": ""}, {})
    )
    pretrained = Pretrained(model, auto, None, trust, folders)
    return replace(pretrained, config=read_config(pretrained.transformer, trust, {**stated, **overrides}))


def read_config(model: str, trust: bool, overrides: Mapping[str, object]) -> Any:
    """Read the configuration of a Hugging Face model, its dtype among it.

    Raises:
        TraceError: it cannot be read.
    """
    auto: Any = optional("transformers").AutoConfig
    try:
        config: Any = auto.from_pretrained(model, trust_remote_code=trust, **overrides)
    except Exception as error:
        first = str(error).strip().splitlines()[0]
        raise TraceError(f"{model}: its configuration cannot be read: {first}") from error
    config.dtype = getattr(config, "dtype", None) or torch.float32
    return config


def _take_quantization(config: Any) -> dict[str, Any]:
    """Take `quantization_config` out of a configuration, so that the float model is built and traced.

    Returns:
        What it says of the library that quantized the checkpoint; empty for a float checkpoint.
    """
    stated: Any = getattr(config, "quantization_config", None)
    if stated is None:
        return {}
    del config.quantization_config
    stated = stated.to_dict() if hasattr(stated, "to_dict") else stated
    if not isinstance(stated, Mapping) or "quant_method" not in stated:
        raise TraceError(
            f"config.json: quantization_config: expected a mapping with a quant_method, got {stated!r}"
        )
    return dict(cast(Mapping[str, Any], stated))


def _quantized_weights(module: nn.Module, directory: Path, packed: Mapping[str, Weight], seed: int) -> Bound:
    if directory.is_dir() and not any(directory.glob("*.safetensors")):
        raise WeightError(
            f"{directory} holds no weights; expected model.safetensors, or shards and their index"
        )
    if not directory.is_dir():
        raise WeightError(
            f"{directory} is quantized, and only read from files here: download it, and name its directory",
            f"hf download {directory} --local-dir {directory.name}",
        )
    missing = missing_parameters(module, directory, packed)
    weights = stored_weights(module, directory, {**packed, **initialised(module, missing, seed)})
    assert weights is not None
    return Bound(weights, _missing_notes(missing, seed))


def _missing_notes(names: Sequence[str], seed: int) -> tuple[str, ...]:
    """The note on parameters that the checkpoint does not hold; none where it holds all."""
    return (f"not in the checkpoint, initialised from seed {seed}: {', '.join(names)}",) if names else ()


def fake_parameters(model: nn.Module) -> None:
    """Turn a model built on the meta device into one of fake CPU tensors, in place; its computed buffers become real.

    Meta constants in a trace would lose their values; fake tensors on the CPU keep devices and constants right.
    """
    fake_tensors(model, FakeTensorMode(allow_non_fake_inputs=True))
    compute_buffers(model)


def fake_mode_of(model: nn.Module) -> FakeTensorMode:
    """The mode that the fake parameters of a model belong to."""
    return next(cast(Any, p).fake_mode for p in model.parameters() if isinstance(p, FakeTensor))


def fake_tensors(model: nn.Module, mode: FakeTensorMode) -> None:
    """Give a model fake tensors of a mode, in place, for those that are on the meta device or fake already.

    Parameters that are one stay one. Buffers that are in no checkpoint stay as they are.
    """
    cpu = torch.device("cpu")
    fakes: dict[int, Any] = {}
    """The id of a tensor on the meta device -> its fake tensor, which tied parameters share."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:  # a legacy torch.Tensor(...) ignores the device and is on the CPU
                fake = FakeTensor(mode, _meta(parameter), cpu)
                fakes.setdefault(id(parameter), nn.Parameter(fake))
                module._parameters[name] = fakes[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                fakes.setdefault(id(buffer), FakeTensor(mode, _meta(buffer), cpu))
                module._buffers[name] = fakes[id(buffer)]


def _meta(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor on the meta device like another one."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def pretrained_weights(pretrained: Pretrained, seed: int) -> Bound:
    """Load the weights with transformers: it renames and converts them, and initialises new heads from the seed.

    Raises:
        WeightError: transformers cannot load them, or the directory holds pickles only.
    """
    directory = Path(pretrained.transformer)
    if directory.is_dir() and not any(directory.glob("*.safetensors*")):
        pickles = sorted(p.name for p in directory.glob("*.bin"))
        content = f"only pickles ({', '.join(pickles)}), which can run code" if pickles else "no weights"
        raise WeightError(
            f"{directory} holds {content}; expected model.safetensors (save_pretrained writes it)"
        )
    with drawing_from(torch.Generator().manual_seed(seed)):
        loaded, info = load_pretrained(pretrained)
    return Bound(held_weights(loaded), _missing_notes(sorted(info["missing_keys"]), seed))


def load_pretrained(pretrained: Pretrained) -> tuple[nn.Module, dict[str, Any]]:
    """Load a model with transformers' own `from_pretrained`.

    Returns:
        The model, and what transformers reports of the checkpoint's keys, such as `missing_keys`.

    Raises:
        WeightError: transformers cannot load it.
    """
    transformers = optional("transformers")
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # adaptc reports missing keys itself
    transformers.logging.disable_progress_bar()
    try:
        return pretrained.auto.from_pretrained(
            pretrained.name,
            config=pretrained.config,
            dtype=pretrained.config.dtype,
            trust_remote_code=pretrained.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:
        raise WeightError(
            f"{pretrained.name}: transformers cannot load the weights: {str(error).splitlines()[0]}"
        ) from error
    finally:
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.enable_progress_bar()
