"""Tied tensors in PEFT's checkpoints: `ensure_weight_tying` changes a tied tensor under all its names."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from adaptc.checkpoints.adapter import Checkpoint
from adaptc.methods.peft_format import TIES

ON_ALIAS = "adaptc_on_alias"
"""The key of adaptc's own format: what is done about tied tensors."""
BASES = (["base_layer"], ["original_module"])
"""What stands in front of the last part of the key of a tensor that is the base's own."""
TIED_NAMES = frozenset({"embed_tokens", "lm_head"})
"""The modules for which PEFT follows that key, by the last part of their names (`EMBEDDING_LAYER_NAMES`)."""


def tying_key(checkpoint: Checkpoint) -> str:
    """The key by which a configuration says that tied tensors change together; "" if it does not say so."""
    if checkpoint.config.get(ON_ALIAS) == "share":
        return ON_ALIAS
    return TIES if checkpoint.config.get(TIES) else ""


def tied_in(checkpoint: Checkpoint, aliases: Mapping[str, str]) -> list[str]:
    """The modules that share one tensor of the base and that a checkpoint changes together.

    PEFT follows its key for some names of modules only; where it did, it wrote the tensors of several names. adaptc
    sets the key only where it holds.

    Args:
        checkpoint: the checkpoint.
        aliases: name of each tensor of the base -> the first name of the same tensor.

    Returns:
        their names, sorted; empty if the checkpoint changes each tensor under one name alone.
    """
    if not tying_key(checkpoint):
        return []
    trained = [key for key in checkpoint.tensors if key.split(".")[-2:-1] not in BASES]
    by_tensor: dict[str, list[str]] = {}
    for name, first in aliases.items():
        by_tensor.setdefault(first, []).append(name.rpartition(".")[0])
    enough = 1 if checkpoint.base_sha256 else 2
    tied: list[str] = []
    for modules in (modules for modules in by_tensor.values() if len(modules) > 1):
        named = [module for module in modules if any(key.startswith(f"{module}.") for key in trained)]
        tied += modules if len(named) >= enough else []
    return sorted(tied)


def is_tied_copy(checkpoint: Checkpoint, key: str, other: str) -> bool:
    """Whether a tensor repeats another as that of a tied head does: `A` of the head is `B` of the embedding, turned."""
    if not checkpoint.config.get(TIES):
        return False
    tensor, turned = checkpoint.tensors[key], checkpoint.tensors[other]
    if len(tensor.shape) != 2 or tensor.shape != turned.shape[::-1]:
        return False
    return torch.equal(tensor.load(), turned.load().T)
