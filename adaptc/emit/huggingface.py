"""A folded Hugging Face checkpoint: a copy of the base's directory with the folded weights."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx.node import map_arg

from adaptc.checkpoints.huggingface_layout import saved_names, saved_weights
from adaptc.checkpoints.huggingface_weights import CONFIG, first_names
from adaptc.checkpoints.sentence_transformer import module_folders
from adaptc.checkpoints.shards import write_shards
from adaptc.emit.manifest import MANIFEST
from adaptc.errors import AdaptcError, ProofError, Refusal, RefusedError, WeightError
from adaptc.ir.base import Pretrained
from adaptc.ir.graph import Graph
from adaptc.optional import optional
from adaptc.tracing.huggingface.model import load_pretrained
from adaptc.tracing.huggingface.settings import parts_of, set_for_tracing
from adaptc.weights import Weight

GENERATION = "generation_config.json"
WEIGHTS = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.ot", "*.npz", "*.gguf"),
    *("*.onnx", "*.onnx_data", "*.onnx.data", "*.tflite", "*.mlmodel", "*.index.json"),
)
"""Patterns of files that hold the base's weights, in any format: these are not copied."""
REPLACED = frozenset({CONFIG, MANIFEST, "adapter_config.json", "quantize_config.json", "quant_config.json"})
"""Files that are not copied: they are written anew, or make transformers load an adapter or quantized weights."""
LOADED_SHARE = 4
"""A checkpoint is loaded for its proof if memory holds it this many times. Chosen as twice what the proof needs."""


def save_checkpoint(folded: Graph, base: Graph, directory: Path, max_shard_size: str) -> dict[str, Any]:
    """Write a directory that `from_pretrained` loads.

    Afterwards the graph reads the weights that are in the files as they are from there, so that the proof is of what
    was written, and no weight is folded twice.

    Args:
        folded: the folded graph, whose weights are written.
        base: the traced graph.
        directory: the directory to write.
        max_shard_size: the size of one file of weights, such as "5GB".

    Returns:
        `class` and `dtype` of the model, and `left_out`: the files of the base that were not copied.

    Raises:
        AdaptcError: the base is no Hugging Face model, or its files cannot be read.
        RefusedError: the folded graph is not a model of the base's class any more.
        ProofError: a tensor is not read back as it was written.
    """
    pretrained = base.source.pretrained
    if pretrained is None:
        raise AdaptcError(f"a Hugging Face checkpoint needs a Hugging Face base, got {base.source.describe}")
    if base.source.beside:
        parts = " and ".join(base.source.beside)
        reason = f"the model has parts of other checkpoints, {parts}, and a Hugging Face checkpoint holds one model"
        raise RefusedError([Refusal(reason, notes=("emit onnx or torch",))])
    if folded.staying:
        reason = f"{folded.staying} cannot be folded into weights, and a Hugging Face checkpoint holds nothing else"
        raise RefusedError(
            [Refusal(reason, notes=("emit onnx or torch; or emit the adapter alone, as peft",))]
        )
    if folded.adaptations:
        live = ", ".join(dict.fromkeys(a.site.module for a in folded.adaptations))
        reason = (
            f"the adapters of {live} are kept live, and a Hugging Face checkpoint holds nothing but weights"
        )
        raise RefusedError(
            [Refusal(reason, notes=("write `on_alias: untie` in their entry, or emit onnx or torch",))]
        )
    config = copy.deepcopy(pretrained.config)
    model = _model_of(pretrained, config, folded)
    persistent = {name for name in folded.weights if name not in folded.transient}
    if persistent != set(model.state_dict()) or _program(folded, base) != _program(base, base):
        reason = f"`passes` change the model's operations, which a checkpoint of {type(model).__name__} cannot hold"
        raise RefusedError([Refusal(reason, notes=("emit onnx, or leave the pass out",))])
    transformer = directory / pretrained.folders[""]
    transformer.mkdir(parents=True, exist_ok=True)
    source = files_of(pretrained)
    left_out = carry_over(source, directory)
    config.architectures = [type(model).__name__]
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.save_pretrained(transformer)
    _keep_generation(source / pretrained.folders[""], model, transformer)
    weights = {name: folded.weights[folded.aliases[name]] for name in saved_names(model, folded.aliases)}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    from_file: dict[int, Weight] = {}
    for part, folder in pretrained.folders.items():
        stored = _weights_of(part, model, weights, pretrained.folders)
        written = write_shards(directory / folder, stored, max_shard_size, parameters) if stored else {}
        from_file |= {id(weight): written[name] for name, weight in stored.items()}
    folded.weights.update({n: from_file[id(w)] for n, w in folded.weights.items() if id(w) in from_file})
    kind = str(config.dtype).removeprefix("torch.")
    return {"class": type(model).__name__, "dtype": kind, "left_out": left_out}


def load_checkpoint(origin: Pretrained, directory: Path) -> nn.Module:
    """The model that transformers' own `from_pretrained` loads from a directory, without a cache of keys and values.

    Args:
        origin: a checkpoint whose task, and layout of folders, the directory has too.
        directory: the checkpoint to load.

    Raises:
        ProofError: it cannot be loaded, or keys are missing or unknown.
    """
    checkpoint = replace(origin, name=str(directory))
    config: Any = optional("transformers").AutoConfig.from_pretrained(
        checkpoint.transformer, trust_remote_code=origin.trust_remote_code
    )
    set_for_tracing(config)
    try:
        model, info = load_pretrained(replace(checkpoint, config=config))
    except WeightError as error:  # the directory is a temporary one, which will be gone
        raise ProofError(str(error).replace(str(directory), directory.name)) from error
    wrong = [f"{kind}: {', '.join(map(str, keys))}" for kind, keys in info.items() if keys]
    if wrong:
        raise ProofError(f"from_pretrained finds other keys than it expects; {'; '.join(wrong)}")
    return model


def _weights_of(
    part: str, model: nn.Module, weights: Mapping[str, Weight], folders: Mapping[str, str]
) -> dict[str, Weight]:
    """The weights of one part of a model, by their keys in its checkpoint."""
    if part:
        return {
            name.removeprefix(f"{part}."): w for name, w in weights.items() if name.startswith(f"{part}.")
        }
    others = tuple(f"{name}." for name in folders if name)
    return saved_weights(model, {name: w for name, w in weights.items() if not name.startswith(others)})


def fits_in_memory(graph: Graph) -> bool:
    """Whether there is memory to load the checkpoint beside the graph that it is compared with."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    size = sum(weight.nbytes for name, weight in graph.weights.items() if graph.aliases[name] == name)
    return size * LOADED_SHARE <= memory


def carry_over(source: Path, directory: Path) -> list[str]:
    """Copy the tokenizer, the licence and all other files of the base but its weights.

    Hidden folders are left out too: they are caches and histories. Modules that a SentenceTransformer has beside its
    transformer are copied whole.

    Returns:
        The files of weights that were left out, relative to `source`.
    """
    left_out: list[str] = []
    others = {folder for folder in module_folders(source)[1:] if folder}
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        name = file.relative_to(source)
        if str(name) in REPLACED or any(part.startswith(".") for part in name.parent.parts):
            continue
        is_weights = any(fnmatchcase(file.name.lower(), pattern) for pattern in WEIGHTS)
        if is_weights and str(name.parent) not in others:
            left_out.append(str(name))
            continue
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, directory / name)
    return left_out


def _model_of(pretrained: Pretrained, config: object, graph: Graph) -> nn.Module:
    """The checkpoint's model without weights; `config` says that weights are untied where the graph has untied them."""
    with torch.device("meta"):
        model = pretrained.auto.from_config(config, trust_remote_code=pretrained.trust_remote_code)
        names = first_names(model)
        if all(graph.aliases.get(name) == graph.aliases.get(first) for name, first in names.items()):
            return model
        for part in parts_of(config):
            if hasattr(part, "tie_word_embeddings"):
                part.tie_word_embeddings = False
        return pretrained.auto.from_config(config, trust_remote_code=pretrained.trust_remote_code)


def _program(graph: Graph, base: Graph) -> list[str]:
    """A graph's operations with their operands, by number instead of name, to compare two graphs."""
    lines: list[str] = []
    shown: dict[Any, Any] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            shown[node] = base.aliases.get(str(node.target), node.target)
        elif node.op == "placeholder":
            shown[node] = node.target
        else:
            operands = map_arg((node.args, dict(node.kwargs)), shown.__getitem__)
            lines.append(f"{node.target} {operands}")
            shown[node] = f"%{len(lines)}"
    return lines


def files_of(pretrained: Pretrained) -> Path:
    """The base's directory; for a hub id, the cached one, with all files but the weights.

    Raises:
        AdaptcError: the files cannot be downloaded.
    """
    if Path(pretrained.name).is_dir():
        return Path(pretrained.name)
    hub = optional("huggingface_hub")
    commit = getattr(pretrained.config, "_commit_hash", None)
    try:
        return Path(hub.snapshot_download(pretrained.name, revision=commit, ignore_patterns=list(WEIGHTS)))
    except (OSError, ValueError) as error:
        raise AdaptcError(f"{pretrained.name}: cannot download its files: {error}") from error


def _keep_generation(source: Path, model: Any, directory: Path) -> None:
    """Write the generation settings of older checkpoints, which have them in a config.json that is not copied."""
    config = optional("transformers").GenerationConfig
    if model.can_generate() and not (directory / GENERATION).exists():
        settings = config.from_pretrained(source, config_file_name=CONFIG, _from_model_config=True)
        settings.to_json_file(directory / GENERATION)
