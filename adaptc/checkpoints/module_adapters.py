"""The adapters of a compiled module: their records, loaded from and saved to checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import fx, nn

from adaptc.checkpoints.adapter import Checkpoint, directories, read
from adaptc.checkpoints.adapter_checks import check_base
from adaptc.checkpoints.compaction import compacted
from adaptc.checkpoints.config_keys import ignoring
from adaptc.checkpoints.earlier_names import with_names_of_base
from adaptc.checkpoints.grouping import group
from adaptc.checkpoints.joined import check_joined
from adaptc.checkpoints.key_parts import modules_holding
from adaptc.checkpoints.lengthened_keys import shortened
from adaptc.checkpoints.peft_config import check_options
from adaptc.checkpoints.peft_write import save
from adaptc.checkpoints.records import AdapterRecord, assign
from adaptc.checkpoints.saved_along import with_base_tensors
from adaptc.checkpoints.whole_modules import with_state
from adaptc.errors import WeightError
from adaptc.ir.aliases import unread_modules
from adaptc.ir.conversion import RECORD
from adaptc.weights import Held

META = RECORD
"""The key in a module's `meta` under which adaptc stores its records of the adapters and the base."""


def records(module: fx.GraphModule) -> list[AdapterRecord]:
    """The records of the adapters in a module that adaptc compiled.

    Raises:
        WeightError: adaptc did not compile it.
    """
    stored = getattr(module, "meta", {}).get(META)
    if stored is None:
        raise WeightError(
            f"{type(module).__name__} was not made by adaptc: it holds no record of its adapters"
        )
    return [AdapterRecord.from_json(record) for record in stored["adapters"]]


def load_adapter_into(
    module: fx.GraphModule, directory: Path, ignore: Sequence[str] = (), model: nn.Module | None = None
) -> dict[str, torch.Tensor]:
    """Copy the tensors of checkpoints into a module's adapters; nothing is changed if they do not fit.

    Args:
        module: a module that adaptc compiled.
        directory: one checkpoint, or several with their order.
        ignore: options of their configurations to read them without.
        model: the base where it is a model of transformers; names of an earlier transformers are read by its table.

    Returns:
        Name -> tensor as the checkpoints hold it, in their dtype.

    Raises:
        WeightError: a checkpoint does not fit the module's adapters or its base.
    """
    base = module.meta[META]["base"]["sha256"]
    unread = unread_modules(module)
    stored = ignoring([read(path) for path in directories(directory)], ignore)
    modules = modules_holding(tensors_of(module))
    named = [with_names_of_base(shortened(checkpoint, modules), model, modules) for checkpoint in stored]
    checkpoints = [replace(checkpoint, unread=unread) for checkpoint in named]
    groups = group(records(module))
    if len(checkpoints) != len(groups):
        raise WeightError(
            f"{directory}: {len(checkpoints)} checkpoints there, but the module holds {len(groups)} adapters"
        )
    values: dict[str, torch.Tensor] = {}
    for checkpoint, members in zip(checkpoints, groups, strict=True):
        check_base(checkpoint, base)
        check_options(checkpoint, members[0])
        if members[0].format is not None:
            check_joined(checkpoint, members[0].format, members[1:])
        values |= assign(_beside(checkpoint, members, module), members)
    tensors = tensors_of(module)
    with torch.no_grad():
        for name, value in values.items():
            tensors[name].copy_(value)
    return values


def _beside(checkpoint: Checkpoint, members: Sequence[AdapterRecord], module: fx.GraphModule) -> Checkpoint:
    """A checkpoint that says which of its tensors are those of a module's base."""
    base = {name: Held(tensor.detach().cpu()) for name, tensor in module.named_parameters()}
    state = {name: Held(tensor.detach().cpu()) for name, tensor in module.named_buffers()}
    keys = [t.key for record in members for t in record.stored]
    return with_base_tensors(with_state(checkpoint, state), keys, base)


def save_adapter_of(module: fx.GraphModule, directory: Path) -> None:
    """Write a module's adapters as PEFT checkpoints: one in `directory`, or several below it with their order.

    Raises:
        WeightError: adaptc did not compile the module, or it has no adapter.
    """
    save(*compacted(records(module), tensors_of(module)), directory, module.meta[META]["base"])


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers of a module by their names."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
