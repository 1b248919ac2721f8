"""Hugging Face bases: a directory or hub id, any task with an Auto class, weights left on disk."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from adaptc.checkpoints.huggingface import stored_weights, untie_as_stored
from adaptc.errors import TraceError, WeightError, unknown
from adaptc.inputs import InputSpec
from adaptc.ir.base import Base, Bound, Pretrained
from adaptc.spec.base import BaseEntry as BaseEntry
from adaptc.tracing.derive import choices, derive_inputs, set_for_tracing
from adaptc.tracing.module import held_weights
from adaptc.tracing.quantized import initialised, missing, packed_weights
from adaptc.weights import Weight


@cache
def tasks() -> dict[str, str]:
    """Task name -> Auto class, for every Auto class transformers has: `causal-lm` -> `AutoModelForCausalLM`."""
    import transformers

    found = {"feature-extraction": "AutoModel"}
    for name in dir(transformers):
        if name.startswith("AutoModelFor"):
            words = re.sub(
                r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", name.removeprefix("AutoModelFor")
            )
            found[words.lower().replace("seq2-seq", "seq2seq")] = name
    return dict(sorted(found.items()))


def unknown_task(task: str) -> str | None:
    """The words for a task nobody has an Auto class for, or None."""
    if task in tasks():
        return None
    return unknown("task", task, tasks(), close=_of_hub(task))


def _of_hub(task: str) -> list[str]:
    """Our task of one that the hub calls by another name, such as text-generation."""
    from transformers.pipelines import SUPPORTED_TASKS

    autos = {auto.__name__ for auto in SUPPORTED_TASKS.get(task, {}).get("pt", ())}
    return [name for name, auto in tasks().items() if auto in autos]


def load(model: str, entry: BaseEntry, seed: int, inputs: tuple[InputSpec, ...]) -> Base:
    """A Hugging Face base whose parameters are fake until bound.

    Args:
        model: a directory, or a hub id.
        entry: the spec's `base`: its task, dtype and what overrides the configuration.
        seed: of weights that the checkpoint does not hold.
        inputs: those of the spec; derived where there are none.

    Raises:
        TraceError: the configuration cannot be read, or the inputs cannot be derived.
    """
    import transformers

    directory = Path(model)
    task, trust = entry.task, entry.trust_remote_code
    auto = getattr(transformers, tasks()[task])
    try:
        config = transformers.AutoConfig.from_pretrained(model, trust_remote_code=trust, **entry.config)
    except Exception as error:
        first = str(error).strip().splitlines()[0]
        raise TraceError(f"{model}: its configuration cannot be read: {first}") from error
    kind = entry.dtype or _dtype_of(config)
    config.dtype = getattr(torch, kind)
    about = _quantization(config)
    pretrained = Pretrained(model, auto, copy.deepcopy(config), trust)
    notes = set_for_tracing(config)
    try:
        with torch.device("meta"):
            module = auto.from_config(config, dtype=config.dtype, trust_remote_code=trust)
    except ValueError as error:
        raise TraceError(
            f"{model} cannot be loaded for task {task!r}: {str(error).splitlines()[0]}"
        ) from error
    notes += choices(module)
    files = tuple(sorted(directory.glob("*.safetensors"))) if directory.is_dir() else ()
    notes += untie_as_stored(module, directory) if files else []
    fake_parameters(module)

    packed = packed_weights(module, directory, about) if about and files else {}
    if about and not files:
        notes.append(
            f"quantized by {about.get('quant_method')}, and its files are not here: planned as floats"
        )

    def find() -> Bound:
        if about:
            return _quantized_weights(module, directory, packed, seed)
        stored = stored_weights(module, directory, {}) if files else None
        return Bound(stored) if stored else pretrained_weights(replace(pretrained, config=config), seed)

    return Base(
        describe=f"{model} ({type(module).__name__}, {kind})",
        model=module,
        find=find,
        heads=_heads(module),
        inputs=inputs or derive_inputs(module, config),
        files=files,
        packed=packed,
        notes=notes,
        pretrained=pretrained,
    )


def _quantization(config: Any) -> dict[str, Any]:
    """What a configuration says of the library that quantized its checkpoint, which is taken out of it."""
    about = getattr(config, "quantization_config", None)
    if about is None:
        return {}
    del config.quantization_config  # a graph is traced of the float model
    about = about.to_dict() if hasattr(about, "to_dict") else about
    if not isinstance(about, Mapping) or "quant_method" not in about:
        raise TraceError(
            f"config.json: quantization_config: expected a mapping with a quant_method, got {about!r}"
        )
    return dict(about)


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
    new = missing(module, directory, packed)
    weights = stored_weights(module, directory, {**packed, **initialised(module, new, seed)})
    assert weights is not None
    return Bound(weights, _initialised(new, seed))


def _initialised(names: Sequence[str], seed: int) -> tuple[str, ...]:
    """The note on weights that no checkpoint holds; none where it holds all."""
    return (f"not in the checkpoint, initialised from seed {seed}: {', '.join(names)}",) if names else ()


def fake_parameters(model: nn.Module) -> None:
    """Turn a model built on the meta device into one of fake CPU tensors, whose computed buffers are real.

    Meta constants in a trace would lose their values; fake tensors on the CPU keep devices and constants right.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    made: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:  # a legacy torch.Tensor(...) is made on the CPU whatever was asked
                data = parameter.data.to("meta")
                made.setdefault(id(parameter), nn.Parameter(FakeTensor(mode, data, torch.device("cpu"))))
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                made.setdefault(id(buffer), FakeTensor(mode, buffer, torch.device("cpu")))
                module._buffers[name] = made[id(buffer)]
    for module in model.modules():
        transient = [n for n in module._non_persistent_buffers_set if module._buffers.get(n) is not None]
        for name in transient:
            buffer = module._buffers[name]
            assert buffer is not None
            module._buffers[name] = torch.empty_like(buffer, device="cpu")
        if transient:  # transformers computes these where it initialises weights; they are in no checkpoint
            model._init_weights(module)  # type: ignore[operator]


def pretrained_weights(pretrained: Pretrained, seed: int) -> Bound:
    """The weights as transformers itself loads them: renamed, converted, new heads initialised from the seed.

    Raises:
        WeightError: transformers cannot load them, or only a pickle is there.
    """
    directory = Path(pretrained.name)
    if directory.is_dir() and not any(directory.glob("*.safetensors*")):
        pickles = sorted(p.name for p in directory.glob("*.bin"))
        what = f"only pickles ({', '.join(pickles)}), which can run code" if pickles else "no weights"
        raise WeightError(f"{directory} holds {what}; expected model.safetensors (save_pretrained writes it)")
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        loaded, info = load_pretrained(pretrained)
    finally:
        torch.random.set_rng_state(state)
    return Bound(held_weights(loaded), _initialised(sorted(info["missing_keys"]), seed))


def load_pretrained(pretrained: Pretrained) -> tuple[nn.Module, dict[str, Any]]:
    """A model as transformers' own `from_pretrained` gives it, and what that says of the checkpoint's keys.

    Raises:
        WeightError: transformers cannot load it.
    """
    import transformers

    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # what it would say of missing keys is said by adaptc
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


def _dtype_of(config: Any) -> str:
    kind = getattr(config, "dtype", None) or torch.float32
    return str(kind).removeprefix("torch.")


def _heads(model: nn.Module) -> frozenset[str]:
    get = getattr(model, "get_output_embeddings", None)
    head = get() if get is not None else None
    names = {name for name, module in model.named_modules() if head is not None and module is head}
    if not names and type(model).__name__.endswith("Classification"):
        parts = (name for name, _ in model.named_modules())
        names = {name for name in parts if name.split(".")[0] in ("classifier", "score")}
    return frozenset(names)
