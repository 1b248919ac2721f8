"""Adapter checkpoints as found on disk: read, checked, and matched with what was inserted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch

from adaptc.checkpoints.adapter import PREFIX, ROOT, Checkpoint, _kind
from adaptc.errors import WeightError
from adaptc.weights import Weight


class Expected(Protocol):
    """What is known of a tensor before it is read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        ...

    @property
    def below(self) -> int | None:
        """Of indices what all of them are below; None for numbers."""
        ...


def spelled(key: str, bare: bool = False) -> str:
    """A key as it stands in the file; in one with virtual tokens `bare`."""
    if bare:
        return key.removeprefix(ROOT) if key.startswith(ROOT) else ROOT + key
    return key if key.startswith(ROOT) else PREFIX + key


def match(checkpoint: Checkpoint, expected: Mapping[str, Expected]) -> None:
    """Check a checkpoint's keys, shapes and kinds against what was inserted; no tensor is loaded.

    Args:
        checkpoint: the checkpoint.
        expected: key without PEFT's prefix -> what it must be.

    Raises:
        WeightError: a tensor is missing, left over or mis-shaped.
    """
    held = checkpoint.tensors
    absent = [key for key in expected if key not in held]
    left = [key for key in held if key not in expected and not key.endswith(".base_layer.weight")]
    left = [key for key in left if not _copied(checkpoint, key, expected)]
    shifted = _shift(left, set(expected)) if left else None
    if shifted:
        raise WeightError(
            f"{checkpoint.path}: {shifted}; it was trained on another task's model: see base.task"
        )
    if absent:
        raise WeightError(
            f"{checkpoint.path}: tensor {spelled(absent[0])!r} is missing; the file is incomplete, "
            "or the adapter was trained on another base"
        )
    for key, wanted in expected.items():
        if held[key].shape != wanted.shape:
            raise WeightError(
                f"{checkpoint.path}: tensor {spelled(key)!r} has shape {list(held[key].shape)}, but this base and "
                f"this configuration need {list(wanted.shape)}; the adapter was trained on another base, "
                "or its configuration was changed"
            )
        if wanted.below is None and not held[key].dtype.is_floating_point:
            words = f"is {_kind(held[key])}; trained weights are floating-point numbers"
            raise WeightError(f"{checkpoint.path}: tensor {spelled(key)!r} {words}")
    if left:
        shown = ", ".join(repr(spelled(key)) for key in left[:3])
        raise WeightError(
            f"{checkpoint.path}: {len(left)} tensors fit no layer this adapter was given: {shown}; "
            "it was trained on another base, or holds something this version does not read"
        )


def load(checkpoint: Checkpoint, expected: Mapping[str, Expected]) -> dict[str, torch.Tensor]:
    """Load tensors that were matched.

    Raises:
        WeightError: one holds a value that is not finite, or an index that points nowhere.
    """
    found = {}
    for key, wanted in expected.items():
        value = found[key] = checkpoint.tensors[key].load()
        if not torch.isfinite(value).all():
            raise WeightError(f"{checkpoint.path}: tensor {spelled(key)!r} holds NaN or infinity")
        if wanted.below is not None and value.numel() and not 0 <= value.min() <= value.max() < wanted.below:
            words = f"holds the index {int(value.max() if value.min() >= 0 else value.min())}"
            raise WeightError(
                f"{checkpoint.path}: tensor {spelled(key)!r} {words}, expected 0 to {wanted.below - 1}"
            )
    return found


def check_carried(checkpoint: Checkpoint, base: Mapping[str, Weight]) -> None:
    """Check that base weights saved along with an adapter are this base's.

    Raises:
        WeightError: one is not: the vocabulary was resized, or the base is another.
    """
    for name, weight in checkpoint.carried.items():
        known = base.get(name)
        if (
            known is None
            or known.shape != weight.shape
            or not torch.equal(known.load(), weight.load().to(known.dtype))
        ):
            if name in checkpoint.beside:
                raise WeightError(
                    f"{checkpoint.path}: it was trained beside another {name} than this base's; a head that the base's "
                    "files do not hold is drawn from `seed`: give the same, or train the head too"
                )
            raise WeightError(
                f"{checkpoint.path}: it holds a {name} that is not this base's (shape {list(weight.shape)}): the "
                "vocabulary was resized or trained; save the resized base too, and name that as base.model"
            )


def check_base(checkpoint: Checkpoint, sha256: str) -> None:
    """Check that a checkpoint which names its base names this one.

    Raises:
        WeightError: it was trained on another.
    """
    if checkpoint.base_sha256 and checkpoint.base_sha256 != sha256:
        raise WeightError(
            f"{checkpoint.path}: this adapter was trained on another base: its own has SHA-256 "
            f"{checkpoint.base_sha256[:12]}..., this one {sha256[:12]}..."
        )


def _copied(checkpoint: Checkpoint, key: str, expected: Iterable[str]) -> bool:
    """Whether a tensor is that of another module once more, as PEFT writes what modules share."""
    held, leaf = checkpoint.tensors, key.rpartition(".")[2]
    alike = [
        k for k in expected if k in held and k.rpartition(".")[2] == leaf and held[k].shape == held[key].shape
    ]
    return any(torch.equal(held[k].load(), held[key].load()) for k in alike)


def _shift(left: list[str], expected: set[str]) -> str | None:
    """Words for keys that fit but for a module put in front, or left out there; None if they do not."""
    for key in left:
        first, _, rest = key.partition(".")
        if rest in expected:
            return f"its keys start with '{first}.', which this model's do not"
        longer = next((name for name in expected if name.partition(".")[2] == key), None)
        if longer:
            return f"this model's keys start with '{longer.partition('.')[0]}.', which its keys do not"
    return None
