"""Adapters with the names of an earlier transformers, read by transformers' own table of names."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

from adaptc.checkpoints.adapter import Checkpoint
from adaptc.checkpoints.experts import put_together
from adaptc.checkpoints.key_parts import base_name, behind_module
from adaptc.checkpoints.peft_targets import module_patterns
from adaptc.methods.peft_format import matches_peft_key
from adaptc.optional import optional
from adaptc.patterns import matches_any

PATTERNS = ("rank_pattern", "alpha_pattern")
"""The keys of a configuration that map names of modules to values."""
NOTE = "its names are those of an earlier transformers, read as this one's"


def with_names_of_base(checkpoint: Checkpoint, model: Any, modules: Collection[str]) -> Checkpoint:
    """A checkpoint whose keys and configuration name layers as the installed transformers does.

    transformers gave layers other names, and made one tensor of the experts of a layer. What its table says of the
    base's weights holds for the adapters of their layers too.

    Args:
        checkpoint: the checkpoint.
        model: the base, a model of transformers; None for another, which has no table of names.
        modules: the names of its modules.

    Raises:
        WeightError: it adapts layers that are parts of one tensor there, and no adapter of that tensor is the same.
    """
    if model is None or checkpoint.in_adaptc_format:
        return checkpoint
    loading: Any = optional("transformers.core_model_loading")
    table: Any = optional("transformers.conversion_mapping")
    transforms: list[Any] = table.get_model_conversion_mapping(model)
    renamings = [item for item in transforms if isinstance(item, loading.WeightRenaming)]
    keys: list[str] = sorted(checkpoint.tensors, key=loading.dot_natural_key)
    names = {key: str(loading.rename_source_key(key, renamings, [])[0]) for key in keys}
    fused = [item for item in transforms if isinstance(item, loading.WeightConverter)]
    renamed = checkpoint
    if len({*names.values()}) == len(names) and _outside(names.values(), modules) < _outside(keys, modules):
        renamed = _renamed(checkpoint, names, modules)
    return put_together(renamed, model, fused, modules)


def names_others(checkpoint: Checkpoint, modules: Collection[str]) -> bool:
    """Whether a checkpoint names modules that a base does not have: more is behind them than a tensor's own name.

    Args:
        checkpoint: the checkpoint.
        modules: the names of the base's modules.
    """
    parts = len(("lora_A", "weight"))
    return not checkpoint.in_adaptc_format and any(
        len(behind_module(key, modules)) > parts for key in checkpoint.tensors
    )


def _outside(keys: Iterable[str], modules: Collection[str]) -> int:
    """How many parts of keys name no module of the base."""
    return sum(len(behind_module(key, modules)) for key in keys)


def _renamed(checkpoint: Checkpoint, names: Mapping[str, str], modules: Collection[str]) -> Checkpoint:
    """A checkpoint with other keys, and with what its configuration says of their modules."""
    endings = {key: "." + ".".join(behind_module(name, modules)) for key, name in names.items()}
    layers = {
        base_name(key.removesuffix(ending)): base_name(names[key].removesuffix(ending))
        for key, ending in endings.items()
        if key.endswith(ending)
    }
    moved = {old: new for old, new in layers.items() if old != new}

    def module_now(module: str) -> str:
        key = next(key for key in names if key.startswith(f"{module}."))
        inner = key.removeprefix(module)
        return names[key].removesuffix(inner) if names[key].endswith(inner) else module

    return replace(
        checkpoint,
        config=_config_of(checkpoint, moved),
        tensors={names[key]: tensor for key, tensor in checkpoint.tensors.items()},
        saved_modules=tuple(module_now(module) for module in checkpoint.saved_modules),
        joined={key: tuple(map(module_now, named)) for key, named in checkpoint.joined.items()},
        notes=(*checkpoint.notes, NOTE),
    )


def _config_of(checkpoint: Checkpoint, moved: Mapping[str, str]) -> dict[str, Any]:
    """A configuration that says of modules by their names now what it says by the names that they had."""
    config = dict(checkpoint.config)
    targets: str | list[str] | None = config.get("target_modules")
    patterns = module_patterns(checkpoint, "target_modules")
    named = sorted(new for old, new in moved.items() if matches_any(patterns, old))
    if isinstance(targets, str):
        config["target_modules"] = "|".join([f"(?:{targets})", *map(re.escape, named)])
    elif targets is not None:
        config["target_modules"] = [*targets, *named]
    for key in PATTERNS:
        stated = config.get(key)
        if isinstance(stated, dict):
            values = cast(dict[str, Any], stated)
            config[key] = {
                re.escape(new): next(v for pattern, v in values.items() if matches_peft_key(pattern, old))
                for old, new in moved.items()
                if any(matches_peft_key(pattern, old) for pattern in values)
            } | values
    return config
