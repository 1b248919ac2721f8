"""Modules that a checkpoint holds whole: all of them must be there, and their state must be that of the base."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch

from adaptc.checkpoints.adapter import Checkpoint, list_of
from adaptc.checkpoints.asked_for import asked_for
from adaptc.checkpoints.config_file import CONFIG, config_error
from adaptc.checkpoints.key_parts import base_name
from adaptc.errors import WeightError
from adaptc.weights import Weight

SAVED = "modules_to_save"


def check_whole_modules(checkpoint: Checkpoint, modules: Collection[str]) -> None:
    """Check that the file holds tensors of every module that `modules_to_save` names.

    Args:
        checkpoint: the checkpoint.
        modules: the names of the base's modules.

    Raises:
        WeightError: it holds none of one of them.
    """
    endings = list_of(str, checkpoint.config.get(SAVED)) or []
    held = [base_name(key) for key in (*checkpoint.tensors, *checkpoint.base_tensors)]
    for module in sorted(modules):
        # adaptc writes whole names; PEFT, which takes them as endings, writes every module that it means by them
        named = module in endings if checkpoint.base_sha256 else module.endswith(tuple(endings))
        if named and not any(name.startswith(f"{module}.") for name in held):
            raise config_error(
                checkpoint.path / CONFIG,
                (SAVED,),
                f"{module} was trained whole, and the file holds no tensor of it; it is incomplete",
                *asked_for(checkpoint),
            )


def with_state(checkpoint: Checkpoint, state: Mapping[str, Weight]) -> Checkpoint:
    """A checkpoint that says which of its tensors are states of layers that this base has too.

    Args:
        checkpoint: the checkpoint.
        state: name -> value, for every buffer of the base.

    Raises:
        WeightError: one differs, as the running statistics of a batch norm do after training.
    """
    held = {key: name for key in checkpoint.tensors if (name := _state_of(key, state))}
    for key, name in held.items():
        theirs, ours = checkpoint.tensors[key].load(), state[name].load()
        counts = not ours.dtype.is_floating_point  # how many batches were seen, which no output depends on
        if not counts and (theirs.shape != ours.shape or not torch.equal(theirs.to(ours.dtype), ours)):
            module = name.rpartition(".")[0]
            raise WeightError(
                f"{checkpoint.path}: it holds {name}, a state of {module} that training left, which is not the base's; "
                "an adapter here holds parameters alone",
                "let PEFT put it into the base: merge_and_unload, save_pretrained, and name that folder as base.model; "
                f"or train without {module}",
            )
    return replace(checkpoint, same=checkpoint.same | held.keys())


def _state_of(key: str, state: Mapping[str, Weight]) -> str:
    """The buffer that a tensor is a value of: its key's, without the words of PEFT in it; "" if there is none."""
    parts = base_name(key).split(".")
    names = (".".join(parts), ".".join([*parts[:-2], parts[-1]]))
    return next((name for name in names if name in state), "")
