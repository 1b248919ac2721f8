"""The base's own tensors in an adapter's checkpoint: embeddings and heads that PEFT saves along."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch

from adaptc.checkpoints.adapter import Checkpoint
from adaptc.checkpoints.key_parts import base_name
from adaptc.weights import Weight


def saved_whole(checkpoint: Checkpoint, key: str) -> bool:
    """Whether a tensor belongs to a module that was trained whole."""
    module = key.rpartition(".")[0]
    return any(f".{module}".endswith(f".{saved}") for saved in checkpoint.saved_modules)


def with_base_tensors(
    checkpoint: Checkpoint, trained: Collection[str], base: Mapping[str, Weight]
) -> Checkpoint:
    """A checkpoint that says which of its tensors are the base's own, and which of these are not as this base has them.

    Args:
        checkpoint: the checkpoint.
        trained: the keys of what the adapter trained.
        base: name -> weight of the base.

    Returns:
        the checkpoint with `same` and `changed`. A base tensor that a trained one stands in for is among the same.
    """
    along = {key: base_name(key) for key in checkpoint.tensors if key not in trained}
    along = {key: name for key, name in along.items() if name in base}
    changed = {
        key: name
        for key, name in along.items()
        if name not in trained and not _equal(base[name], checkpoint.tensors[key])
    }
    return replace(checkpoint, same=frozenset(along.keys() - changed.keys()), changed=changed)


def _equal(ours: Weight, theirs: Weight) -> bool:
    """Whether two tensors are equal in the dtype of the first."""
    return ours.shape == theirs.shape and torch.equal(ours.load(), theirs.load().to(ours.dtype))
