"""Tiny random models of every model type of transformers: rules shrink their configurations, none by its name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

VOCABULARY, POSITIONS, LAYERS, EXPERTS, PATCHES = 128, 64, 2, 4, 4
"""The sizes of a tiny model: of its tables, its depth, its experts, and the patches along the side of an image."""
FACTORS = (32, 16, 8, 4, 2, 1)
"""By how much widths are divided: the largest with which the model runs. One factor for all, so that they still fit."""
HEAD = 4
"""The least width of an attention head."""
WIDTH = re.compile(
    r"(?!.*(vocab|image|patch|kernel|window|block|chunk|codebook|stride|merge|crop|grid|length|group|pool|input_size))"
    r"(?!num_|n_|max_|max$)"
    r".*(hidden|d_model|dim|size|width|channels?|embd|embed|ffn|inner|filters|rank|d_ff|d_kv|units|d_head|scalar)\w*"
)
"""The names of widths. Numbers below 16 are none, such as the channels of an image."""
DEPTH = re.compile(
    r"(?!.*feat_extract)((\w+_)?(num|n)?_?(layers?|blocks|depths?)|stage_num_blocks|num_block_repeats)"
)
"""The names of numbers of layers."""
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth")
"""The names of the number of all layers of a model."""
MISSING: Mapping[str, int] = {"prediction_length": 4, "vocab_size": VOCABULARY}
"""Numbers that some configurations lack by themselves."""
LIMITS: Mapping[str, int] = {
    r"(\w+_)?vocab(ulary)?_size(\w+)?": VOCABULARY,
    r"(\w+_)?(max_position_embeddings|n_positions|context_length|max_\w+_positions|n_ctx|max_seq_len\w*)": POSITIONS,
    r"(num|n)_(local_|routed_)?experts|moe_num_experts": EXPERTS,
    r"(num_)?(experts_per_tok(en)?|moe_topk|top_k|moe_k|num_selected_experts)|num_experts_per_tok": 2,
    r"n_group|topk_group|num_expert_group|topk_groups|n_groups_moe|first_k_dense_replace|num_dense_layers": 1,
    r"(\w+_)?(num_queries|num_query_tokens|num_frames|index_topk|num_denoising)": 8,
}
"""A regex on the name of a number -> the most that it stays."""
TOKEN = re.compile(r"(\w+_)?(token_id|token_index|index|id)")
"""The names of tokens, which are made to lie in the vocabulary."""


def tiny_configurations(kind: type[Any]) -> Iterator[Any]:
    """The configurations of a class that can be made, the smallest first.

    Args:
        kind: the class of the configuration.

    Raises:
        Exception: whatever the class raises where none can be made.
    """
    seen: list[Any] = []
    failures: list[Exception] = []
    for factor in FACTORS:
        for patches in (PATCHES, None):
            options = shrunk(kind(), factor, patches)
            if options in seen or options is None:
                continue
            seen.append(options)
            try:
                made = kind(**options)
            except Exception as error:  # the sizes do not fit one another
                failures.append(error)
            else:
                yield made
    if len(failures) == len(seen):
        raise failures[0]


def shrunk(config: Any, factor: int, patches: int | None) -> dict[str, Any] | None:
    """What a configuration is told to be tiny; None where the width of its heads cannot be divided by the factor.

    Args:
        config: with its usual sizes.
        factor: by which widths are divided.
        patches: how many patches an image is wide; None for its usual size.
    """
    values: dict[str, Any] = dict(vars(config))
    head = _head(values)
    if factor > 1 and head and (head % (2 * factor) or head // factor < HEAD):
        return None
    layers = next((values[name] for name in DEPTHS if isinstance(values.get(name), int)), 0)
    kinds = _one_of_each(values)
    depth = len(kinds[next(iter(kinds))]) if kinds else min(layers, LAYERS)
    options: dict[str, Any] = {}
    for name, value in values.items():
        key = name.removeprefix("_")
        if hasattr(value, "to_dict"):
            part = shrunk(value, factor, patches)
            if part is None:
                return None
            options[key] = {**value.to_diff_dict(), "model_type": value.model_type, **part}
            continue
        small: Any = kinds.get(name) or _small(name, value, factor)
        if isinstance(value, list) and len(value) == layers > depth and name not in kinds:
            small = small[:depth]
        if name in DEPTHS and isinstance(value, int):
            small = depth
        if small != value and (key == name or hasattr(type(config), key)):
            options[key] = small
    if head and "head_dim" in values:
        options["head_dim"] = head // factor
    _meet(values, options)
    return {**options, **_of_images(values, patches)}


def _meet(values: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Let what a tower of images gives be as wide as the texts beside it, which some usual sizes are not.

    So is the number of angles by which a head is turned: by time, height and width.
    """
    if "text_config" not in options or not hasattr(values["text_config"], "hidden_size"):
        return
    text: dict[str, Any] = {**vars(values["text_config"]), **options["text_config"]}
    for name, value in values.items():
        if hasattr(value, "out_hidden_size"):
            options[name]["out_hidden_size"] = text["hidden_size"]
    turned, half = text.get("rope_parameters"), (_head(text) or 0) // 2
    if isinstance(turned, dict) and "mrope_section" not in turned:
        sections = [half - 2 * (half // 3), half // 3, half // 3]
        options["text_config"]["rope_parameters"] = {**turned, "mrope_section": sections}


def _small(name: str, value: Any, factor: int) -> Any:
    """A value as it is in a tiny model."""
    if value is None:
        return MISSING.get(name)
    if isinstance(value, dict):
        return {key: _sections(key, item, factor) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return (
            type(value)(_small(name, item, factor) for item in value) if not name.startswith("_") else value
        )
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    limit = next((most for pattern, most in LIMITS.items() if re.fullmatch(pattern, name)), None)
    if limit is not None:
        return min(value, limit)
    if DEPTH.fullmatch(name):
        return min(value, LAYERS)
    if TOKEN.fullmatch(name) and value >= VOCABULARY:
        return VOCABULARY - 1 - value % 50
    return max(value // factor, 1) if value >= 16 and WIDTH.fullmatch(name) else value


def _sections(key: str, value: Any, factor: int) -> Any:
    """The parts of a head that turn by different positions."""
    return [item // factor for item in value] if key == "mrope_section" and value else value


def _head(values: Mapping[str, Any]) -> int | None:
    """The width of an attention head."""
    width, heads, stated = (values.get(name) for name in ("hidden_size", "num_attention_heads", "head_dim"))
    if isinstance(stated, int):
        return stated
    return width // heads if isinstance(width, int) and isinstance(heads, int) and heads else None


def _one_of_each(values: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The kinds of layers of a model, each of them once: the name of the list -> kinds."""
    lists = {name: values[name] for name in ("layer_types", "mlp_layer_types") if values.get(name)}
    kinds = list(dict.fromkeys(zip(*lists.values(), strict=False)))
    kinds = kinds if len(kinds) >= LAYERS else kinds * LAYERS
    return {name: [kind[index] for kind in kinds] for index, name in enumerate(lists)}


def _of_images(values: Mapping[str, Any], patches: int | None) -> dict[str, Any]:
    """An image of a few patches."""
    size, patch = values.get("image_size"), values.get("patch_size")
    if patches is None or not isinstance(patch, int) or size is None:
        return {}
    side = patches * patch
    return {"image_size": [side] * len(size) if isinstance(size, (list, tuple)) else side}


def randomise(model: nn.Module) -> nn.Module:
    """Fill every weight with random values, none of them zero, in place."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.dtype.is_floating_point:
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
            if tensor.dim() == 1 and name.endswith("weight"):
                tensor.add_(1.0)
        for name, tensor in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return model
