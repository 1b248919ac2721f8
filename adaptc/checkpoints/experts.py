"""LoRA on layers that are parts of one tensor in the installed transformers, as experts are: put together by PEFT."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from adaptc.checkpoints.adapter import Checkpoint
from adaptc.checkpoints.key_parts import PREFIX, behind_module
from adaptc.checkpoints.peft_config import declared
from adaptc.errors import WeightError
from adaptc.methods.low_rank import LowRank
from adaptc.optional import MissingPackageError, optional
from adaptc.weights import Held, Weight

FACTOR = re.compile(r"\.lora_([AB])\.weight$")
"""What LoRA puts behind the name of a layer."""
DROPOUT = "lora_dropout"
INNER = ".base_layer."
"""Where PEFT puts the first of two parameters of a module that are both adapted."""


def put_together(
    checkpoint: Checkpoint, model: Any, converters: Sequence[Any], modules: Collection[str]
) -> Checkpoint:
    """A checkpoint whose LoRA on parts of a tensor is LoRA on that tensor.

    Args:
        checkpoint: the checkpoint.
        model: the base, a model of transformers.
        converters: what transformers does to tensors of such a model when it loads them.
        modules: the names of the base's modules.

    Raises:
        WeightError: no LoRA on the whole tensor is the same, or PEFT is not installed.
    """
    tensor_of = {
        key: whole
        for key in checkpoint.tensors
        if FACTOR.search(key) and len(behind_module(key, modules)) > 2
        for converter in converters
        if (whole := _whole(key, converter)) is not None
    }
    if not tensor_of:
        return checkpoint
    config = {**checkpoint.config, **_configured(checkpoint, tensor_of)}
    tensors: dict[str, Weight] = {k: w for k, w in checkpoint.tensors.items() if k not in tensor_of}
    tensors |= _by_peft(checkpoint, model, tensor_of)
    layers, wholes = {FACTOR.sub("", key) for key in tensor_of}, {*tensor_of.values()}
    notes = [
        f"its {len(layers)} layers that are parts of {len(wholes)} tensors in this transformers were put together, "
        "by PEFT"
    ]
    if checkpoint.config.get(DROPOUT):
        notes.append(
            f"{DROPOUT} is left out, which LoRA on such tensors has none of: it matters in training alone"
        )
    return replace(checkpoint, config=config, tensors=tensors, notes=(*checkpoint.notes, *notes))


def _whole(key: str, converter: Any) -> str | None:
    """The name of the tensor that the weight of a factor's layer is a part of; None where it is of no such tensor."""
    name, pattern = converter.rename_source_key(FACTOR.sub(".weight", key))
    return None if pattern is None else str(name)


def _configured(checkpoint: Checkpoint, tensor_of: Mapping[str, str]) -> dict[str, Any]:
    """What a configuration says of the whole tensors: which they are, their ranks, and their alphas.

    LoRA on n parts of rank r, put together, has rank n r, and the alpha that gives it the scale of the parts.

    Raises:
        WeightError: its method is not LoRA, or the parts of a tensor have different scales.
    """
    declaration = declared(checkpoint)
    method: Any = declaration.method(**declaration.options)
    if not isinstance(method, LowRank) or method.peft is None or not method.peft.by_parameter:
        raise _no_such(checkpoint, next(iter(tensor_of)), tensor_of)
    ranks: dict[str, dict[str, int]] = {}
    scales: dict[str, float] = {}
    for key, whole in tensor_of.items():
        layer, rank = FACTOR.sub("", key), checkpoint.tensors[key].shape[0]
        if not key.endswith("A.weight"):
            continue
        scale = replace(method, r=rank, alpha=method.alpha_at(layer)).scale
        if scales.setdefault(whole, scale) != scale:
            raise _no_such(checkpoint, key, tensor_of)
        ranks.setdefault(whole, {})[layer.rpartition(".")[2]] = rank
    total = {re.escape(whole): sum(parts.values()) for whole, parts in ranks.items()}
    alphas = {
        re.escape(whole): scale / replace(method, r=total[re.escape(whole)], alpha=1.0).scale
        for whole, scale in scales.items()
    }
    stated = checkpoint.config
    return {
        "target_parameters": [*(stated.get("target_parameters") or ()), *ranks],
        "rank_pattern": total | (stated.get("rank_pattern") or {}),
        "alpha_pattern": alphas | (stated.get("alpha_pattern") or {}),
        DROPOUT: 0.0,
    }


def _by_peft(checkpoint: Checkpoint, model: Any, tensor_of: Mapping[str, str]) -> dict[str, Weight]:
    """The factors of the whole tensors by their keys, as PEFT puts them together.

    Raises:
        WeightError: PEFT is not installed, or cannot put them together.
    """
    first = next(iter(tensor_of))
    try:
        peft: Any = optional("peft")
        conversion: Any = optional("peft.utils.transformers_weight_conversion")
    except MissingPackageError as error:
        raise WeightError(
            f"{_is_part(checkpoint, first, tensor_of)}; PEFT can put them together: {error.message}",
            *error.notes,
        ) from None
    parts = {PREFIX + key: checkpoint.tensors[key].load() for key in tensor_of}
    try:
        converted: dict[str, torch.Tensor] = conversion.convert_peft_adapter_state_dict_for_transformers(
            model=model, peft_config=peft.LoraConfig(), adapter_state_dict=parts
        )
    except (ValueError, RuntimeError, KeyError, TypeError, IndexError):
        raise _no_such(checkpoint, first, tensor_of) from None
    remaining = next((key for key in parts if key in converted), None)
    if remaining is not None:
        raise _no_such(checkpoint, remaining.removeprefix(PREFIX), tensor_of)
    owners = [whole.rpartition(".")[0] for whole in {*tensor_of.values()}]
    alone = tuple(f"{owner}{INNER}" for owner in owners if owners.count(owner) == 1)
    keys = {key.removeprefix(PREFIX): tensor for key, tensor in converted.items()}
    return {
        (key.replace(INNER, ".") if key.startswith(alone) else key): Held(tensor.contiguous())
        for key, tensor in keys.items()
    }


def _is_part(checkpoint: Checkpoint, key: str, tensor_of: Mapping[str, str]) -> str:
    layer = FACTOR.sub("", key)
    return (
        f"{checkpoint.path}: it adapts {layer}, which this transformers holds as a part of {tensor_of[key]}"
    )


def _no_such(checkpoint: Checkpoint, key: str, tensor_of: Mapping[str, str]) -> WeightError:
    """The error about factors of parts that are no factors of the whole."""
    return WeightError(
        f"{_is_part(checkpoint, key, tensor_of)}, and no adapter of that tensor is the same",
        "merge it into its base with the transformers that it was trained with, or train it again on this one",
    )
