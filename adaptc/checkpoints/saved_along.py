"""The base's own tensors in an adapter's checkpoint: embeddings and heads that PEFT saves along."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch

from adaptc.checkpoints.adapter import Checkpoint
from adaptc.checkpoints.key_parts import base_name
from adaptc.weights import Weight


def with_base_tensors(
    checkpoint: Checkpoint, trained: Collection[str], base: Mapping[str, Weight]
) -> Checkpoint:
    """A checkpoint that says which of its tensors are the base's own, and which of these are not as this base has them.

    Args:
        checkpoint: the checkpoint.
        trained: the keys of what the adapter trained.
        base: name -> weight of the base.

    Returns:
        the checkpoint with `same` and `changed`. Among the same are those that a trained tensor stands in for, and the
        copies of one that PEFT writes under the other names of a tied tensor.
    """
    along = {key: base_name(key) for key in checkpoint.tensors if key not in trained}
    along = {key: name for key, name in along.items() if name in base}
    changed = {
        key: name
        for key, name in along.items()
        if name not in trained
        and not _equal(base[name], checkpoint.tensors[key])
        and not _repeats(checkpoint, key, trained)
    }
    notes = [
        f"its own {name}, which differs from the base's, is put in its place" for name in changed.values()
    ]
    return replace(
        checkpoint,
        same=checkpoint.same | (along.keys() - changed.keys()),
        changed=changed,
        notes=(*checkpoint.notes, *notes),
    )


def _repeats(checkpoint: Checkpoint, key: str, trained: Collection[str]) -> bool:
    """Whether a tensor is a copy of one that was trained."""
    tensors, leaf = checkpoint.tensors, key.rpartition(".")[2]
    alike = [other for other in trained if other in tensors and other.rpartition(".")[2] == leaf]
    return any(_equal(tensors[key], tensors[other]) for other in alike)


def _equal(ours: Weight, theirs: Weight) -> bool:
    """Whether two tensors are equal in the dtype of the first."""
    return ours.shape == theirs.shape and torch.equal(ours.load(), theirs.load().to(ours.dtype))
