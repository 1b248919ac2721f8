"""The torch artifact: a `torch.export` program and what makes it a trainable module again."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import fx, nn

from adaptc.checkpoints.adapter import directories, read
from adaptc.checkpoints.adapter_checks import check_base
from adaptc.checkpoints.peft_config import check_options
from adaptc.checkpoints.peft_write import save
from adaptc.checkpoints.records import AdapterRecord, assign, compacted, group
from adaptc.errors import WeightError

META = "adaptc"
"""The key of a module's `meta` under which adaptc keeps what it knows of it."""


def records(module: fx.GraphModule) -> list[AdapterRecord]:
    """The adapters of a module that adaptc made.

    Raises:
        WeightError: adaptc did not make it.
    """
    about = getattr(module, "meta", {}).get(META)
    if about is None:
        raise WeightError(
            f"{type(module).__name__} was not made by adaptc: it holds no record of its adapters"
        )
    return [AdapterRecord.from_json(record) for record in about["adapters"]]


def load_adapter_into(module: fx.GraphModule, directory: Path) -> None:
    """Copy a checkpoint's tensors into a module's adapters; nothing is changed if they do not fit.

    Raises:
        WeightError: the checkpoint does not fit the module's adapters.
    """
    base = module.meta[META]["base"]["sha256"]
    found = [read(path) for path in directories(directory)]
    groups = group(records(module))
    if len(found) != len(groups):
        raise WeightError(
            f"{directory}: {len(found)} checkpoints there, but the module holds {len(groups)} adapters"
        )
    values: dict[str, torch.Tensor] = {}
    for checkpoint, members in zip(found, groups, strict=True):
        check_base(checkpoint, base)
        check_options(checkpoint, members[0])
        values |= assign(checkpoint, members)
    tensors = tensors_of(module)
    with torch.no_grad():
        for name, value in values.items():
            tensors[name].copy_(value)


def save_adapter_of(module: fx.GraphModule, directory: Path) -> None:
    """Write a module's adapters as PEFT checkpoints."""
    save(*compacted(records(module), tensors_of(module)), directory, module.meta[META]["base"])


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers of a module by their names."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
