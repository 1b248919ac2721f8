"""Check an adapter checkpoint against a model: keys, shapes, dtypes, values, and the base it was trained on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch

from adaptc.checkpoints.adapter import Checkpoint, dtype_name
from adaptc.checkpoints.asked_for import Layers, asked_for, in_base, quoted, spelled
from adaptc.checkpoints.key_parts import base_name
from adaptc.checkpoints.tied import is_tied_copy
from adaptc.errors import WeightError
from adaptc.weights import Weight

NOT_SHOWN = Layers()


class Expected(Protocol):
    """What a tensor of a checkpoint must be."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        ...

    @property
    def below(self) -> int | None:
        """The exclusive upper bound of indices; None for a tensor of numbers."""
        ...


def match(checkpoint: Checkpoint, expected: Mapping[str, Expected], layers: Layers = NOT_SHOWN) -> None:
    """Check the keys, shapes and dtypes of a checkpoint against what was inserted; no expected tensor is loaded.

    Args:
        checkpoint: the checkpoint.
        expected: key without PEFT's prefix -> what its tensor must be.
        layers: what errors say of this base.

    Raises:
        WeightError: a tensor is missing or unexpected, or has another shape or dtype.
    """
    tensors, idle = checkpoint.tensors, checkpoint.idle
    for key, weight in tensors.items():
        if weight.dtype in (torch.uint8, torch.bool):
            raise WeightError(
                f"{checkpoint.path}: tensor {spelled(key)!r} is {dtype_name(weight)}, which no adapter has"
            )
    absent = [key for key in expected if key not in tensors]
    unexpected = [
        key
        for key in tensors
        if key not in expected and key not in idle and not _is_copy(checkpoint, key, expected)
    ]
    prefix = _prefix_problem(unexpected, set(expected)) if unexpected else None
    if prefix:
        raise WeightError(
            f"{checkpoint.path}: {prefix}; it was trained on another task's model: see base.task"
        )
    if absent:
        raise WeightError(
            f"{checkpoint.path}: tensor {spelled(absent[0])!r} is missing; of {len(expected)} tensors that its "
            f"configuration asks for on this base, the file holds {len(expected) - len(absent)}",
            *asked_for(checkpoint),
        )
    for key, requirement in expected.items():
        tensor = tensors[key]
        if tensor.shape != requirement.shape:
            raise _of_other_shape(checkpoint, key, requirement.shape, layers.vocabularies)
        if requirement.below is None and not tensor.dtype.is_floating_point:
            raise WeightError(
                f"{checkpoint.path}: tensor {spelled(key)!r} is {dtype_name(tensor)}; trained weights are "
                "floating-point numbers"
            )
    if unexpected:
        raise WeightError(
            f"{checkpoint.path}: {len(unexpected)} tensors fit no layer this adapter was given: {quoted(unexpected)}",
            *in_base(unexpected[0], layers),
            *asked_for(checkpoint),
        )


def load(checkpoint: Checkpoint, expected: Mapping[str, Expected]) -> dict[str, torch.Tensor]:
    """Load the tensors of a checkpoint that `match` has accepted.

    Returns:
        Key without PEFT's prefix -> tensor.

    Raises:
        WeightError: a tensor contains NaN or infinity, or an index that is out of range.
    """
    values: dict[str, torch.Tensor] = {}
    for key, requirement in expected.items():
        value = values[key] = checkpoint.tensors[key].load()
        if not torch.isfinite(value).all():
            raise WeightError(f"{checkpoint.path}: tensor {spelled(key)!r} contains NaN or infinity")
        if requirement.below is None or not value.numel():
            continue
        smallest, largest = int(value.min()), int(value.max())
        if not 0 <= smallest <= largest < requirement.below:
            raise WeightError(
                f"{checkpoint.path}: tensor {spelled(key)!r} holds the index "
                f"{largest if smallest >= 0 else smallest}, expected 0 to {requirement.below - 1}"
            )
    return values


def check_base_weights(checkpoint: Checkpoint, base: Mapping[str, Weight]) -> None:
    """Check that the heads that adaptc wrote into an adapter's checkpoint for PEFT are this base's.

    Args:
        checkpoint: the checkpoint.
        base: name -> weight of this base.

    Raises:
        WeightError: one differs.
    """
    for name, weight in checkpoint.base_tensors.items():
        ours = base.get(name)
        if (
            ours is None
            or ours.shape != weight.shape
            or not torch.equal(ours.load(), weight.load().to(ours.dtype))
        ):
            raise WeightError(
                f"{checkpoint.path}: it was trained beside another {name} than this base's; a head that the base's "
                "files do not hold is drawn from `seed`: give the same, or train the head too"
            )


def check_base(checkpoint: Checkpoint, sha256: str) -> None:
    """Check that a checkpoint which names its base was trained on this one.

    Args:
        checkpoint: the checkpoint.
        sha256: the hash of this base.

    Raises:
        WeightError: it was trained on another base.
    """
    if checkpoint.base_sha256 and checkpoint.base_sha256 != sha256:
        raise WeightError(
            f"{checkpoint.path}: this adapter was trained on another base: its own has SHA-256 "
            f"{checkpoint.base_sha256}, this one {sha256}"
        )


def _of_other_shape(
    checkpoint: Checkpoint, key: str, wanted: tuple[int, ...], vocabularies: Mapping[str, int]
) -> WeightError:
    """The error about a tensor whose shape is not the one that this base and the configuration need."""
    shape, where = checkpoint.tensors[key].shape, f"{checkpoint.path}: tensor {spelled(key)!r}"
    if 0 in shape or (len(shape) == 1 < len(wanted)):
        return WeightError(
            f"{where} has shape {list(shape)} instead of {list(wanted)}: it was saved while its values were "
            "distributed (DeepSpeed ZeRO-3 or FSDP), so they are not in the file",
            "save it again with the values gathered: stage3_gather_16bit_weights_on_model_save for DeepSpeed, "
            "a full state dict for FSDP; or convert the training checkpoint by zero_to_fp32.py",
        )
    module = next((name for name in vocabularies if base_name(key).startswith(f"{name}.")), "")
    other = [(a, b) for a, b in zip(shape, wanted, strict=False) if a != b]
    if module and len(shape) == len(wanted) and len(other) == 1 and other[0][1] == vocabularies[module]:
        entries = other[0][0]
        return WeightError(
            f"{where} is for a vocabulary of {entries} words, and {module} of this base has {vocabularies[module]}: "
            "the vocabulary was resized before the adapter was trained",
            f"resize the base in the same way and save it, model.resize_token_embeddings({entries}) and "
            "model.save_pretrained(folder), and name that folder as base.model",
        )
    return WeightError(
        f"{where} has shape {list(shape)}, but this base and this configuration need {list(wanted)}; the adapter was "
        "trained on another base, or its configuration was changed"
    )


def _is_copy(checkpoint: Checkpoint, key: str, expected: Iterable[str]) -> bool:
    """Whether a tensor repeats that of another module: PEFT writes a shared module once for each of its names."""
    tensors, leaf = checkpoint.tensors, key.rpartition(".")[2]
    candidates = [
        tensors[other]
        for other in expected
        if other in tensors
        and other.rpartition(".")[2] == leaf
        and tensors[other].shape == tensors[key].shape
    ]
    if any(torch.equal(candidate.load(), tensors[key].load()) for candidate in candidates):
        return True
    return any(is_tied_copy(checkpoint, key, other) for other in expected if other in tensors)


def _prefix_problem(unexpected: list[str], expected: set[str]) -> str | None:
    """The message for keys that would fit with a module more, or less, in front; None if they would not."""
    for key in unexpected:
        first, _, rest = key.partition(".")
        if rest in expected:
            return f"its keys start with '{first}.', which this model's do not"
        longer = next((name for name in expected if name.partition(".")[2] == key), None)
        if longer:
            return f"this model's keys start with '{longer.partition('.')[0]}.', which its keys do not"
    return None
