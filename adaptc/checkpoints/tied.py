"""Tied tensors in PEFT's checkpoints: `ensure_weight_tying` changes a tied tensor under all its names."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from adaptc.checkpoints.adapter import BASE_LAYER, Checkpoint

TIES = "ensure_weight_tying"
"""PEFT's key: what changes an embedding changes the head that is tied to it, too."""
TIED_NAMES = frozenset({"embed_tokens", "lm_head"})
"""The modules for which PEFT follows that key, by the last part of their names (`EMBEDDING_LAYER_NAMES`)."""


def tied_in(checkpoint: Checkpoint, aliases: Mapping[str, str]) -> tuple[str, ...]:
    """The modules that share one tensor of the base and that a checkpoint changes together.

    PEFT follows its key for some names of modules only; where it did, it wrote the tensors of all names. adaptc sets
    the key only where it holds.

    Args:
        checkpoint: the checkpoint.
        aliases: name of each tensor of the base -> the first name of the same tensor.

    Returns:
        their names; empty if the checkpoint changes each tensor under one name alone.
    """
    if not checkpoint.config.get(TIES):
        return ()
    by_tensor: dict[str, dict[str, None]] = {}
    for key in checkpoint.tensors:
        module = _module_of(key, aliases) if not key.endswith(BASE_LAYER) else None
        if module is not None:
            by_tensor.setdefault(aliases[f"{module}.weight"], {})[module] = None
    several = [modules for modules in by_tensor.values() if len(modules) > 1]
    if several:
        return tuple(name for modules in several for name in modules)
    if checkpoint.base_sha256 is None:
        return ()
    return tuple(name for modules in by_tensor.values() for name in modules)


def _module_of(key: str, aliases: Mapping[str, str]) -> str | None:
    """The module of the base that a tensor belongs to, if its weight can be tied; None for any other."""
    parts = key.split(".")
    names = (".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1))
    return next((name for name in names if f"{name}.weight" in aliases), None)


def is_tied_copy(checkpoint: Checkpoint, key: str, other: str) -> bool:
    """Whether a tensor repeats another as that of a tied head does: `A` of the head is `B` of the embedding, turned."""
    if not checkpoint.config.get(TIES):
        return False
    tensor, turned = checkpoint.tensors[key], checkpoint.tensors[other]
    if len(tensor.shape) != 2 or tensor.shape != turned.shape[::-1]:
        return False
    return torch.equal(tensor.load(), turned.load().T)
