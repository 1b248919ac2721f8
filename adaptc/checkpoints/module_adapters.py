"""The adapters of a compiled module: their records, loaded from and saved to checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import fx, nn

from adaptc.checkpoints.adapter import Checkpoint, directories, of_name, read
from adaptc.checkpoints.adapter_checks import check_base
from adaptc.checkpoints.compaction import compacted
from adaptc.checkpoints.config_keys import ignoring
from adaptc.checkpoints.earlier_names import names_others, with_names_of_base
from adaptc.checkpoints.grouping import group
from adaptc.checkpoints.joined import check_joined
from adaptc.checkpoints.key_parts import modules_holding
from adaptc.checkpoints.left_out import left_out
from adaptc.checkpoints.lengthened_keys import shortened
from adaptc.checkpoints.peft_config import check_options
from adaptc.checkpoints.peft_write import save
from adaptc.checkpoints.recorded_model import recorded_model
from adaptc.checkpoints.records import AdapterRecord, assign
from adaptc.checkpoints.saved_along import with_base_tensors
from adaptc.checkpoints.whole_modules import with_state
from adaptc.errors import ProofError, WeightError
from adaptc.ir.aliases import unread_modules
from adaptc.ir.conversion import META
from adaptc.ir.switched import SwitchedModule
from adaptc.weights import Held

MODEL = "model"
"""The key in a module's record of what the base is made of, where it is a model of transformers."""


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


def own_records(module: SwitchedModule, name: str) -> list[AdapterRecord]:
    """The records of an alternative of a module, without those of what is always on."""
    always = module.meta_of(None)[META]["adapters"]
    added = [record for record in module.meta_of(name)[META]["adapters"] if record not in always]
    return [AdapterRecord.from_json(record) for record in added]


@dataclass(frozen=True)
class LoadedAdapter:
    """What was copied into a module.

    Attributes:
        values: name -> tensor as the checkpoints hold it, in their dtype.
        notes: how the checkpoints were read, for the person.
    """

    values: Mapping[str, torch.Tensor]
    notes: tuple[str, ...]


def load_adapter_into(
    module: fx.GraphModule,
    directory: Path,
    ignore: Sequence[str] = (),
    model: nn.Module | None = None,
    held: Sequence[AdapterRecord] | None = None,
) -> LoadedAdapter:
    """Copy the tensors of checkpoints into a module's adapters; nothing is changed if they do not fit.

    Args:
        module: a module that adaptc compiled.
        directory: one checkpoint, or several with their order.
        ignore: options of their configurations to read them without.
        model: the base where it is a model of transformers; names of an earlier transformers are read by its table.
            Where it is not at hand it is made again of what the module knows of it.
        held: the records of the adapters to load; all that the module has if left out.

    Raises:
        WeightError: a checkpoint does not fit the module's adapters or its base.
    """
    base = module.meta[META]["base"]["sha256"]
    unread = unread_modules(module)
    stored = ignoring([read(path) for path in directories(directory)], ignore)
    modules = modules_holding(tensors_of(module))
    named = [shortened(checkpoint, modules) for checkpoint in stored]
    if model is None and any(names_others(checkpoint, modules) for checkpoint in named):
        model = recorded_model(module.meta[META].get(MODEL, {}))
    named = [with_names_of_base(checkpoint, model, modules) for checkpoint in named]
    checkpoints = [replace(checkpoint, unread=unread) for checkpoint in named]
    groups = group(records(module) if held is None else held)
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
    return LoadedAdapter(values, tuple(f"{c.path}: {note}" for c in checkpoints for note in c.notes))


def _beside(checkpoint: Checkpoint, members: Sequence[AdapterRecord], module: fx.GraphModule) -> Checkpoint:
    """A checkpoint that says which of its tensors are those of a module's base."""
    base = {name: Held(tensor.detach().cpu()) for name, tensor in module.named_parameters()}
    state = {name: Held(tensor.detach().cpu()) for name, tensor in module.named_buffers()}
    keys = [t.key for record in members for t in record.stored]
    return with_base_tensors(with_state(checkpoint, state), keys, base)


def save_adapter_of(module: fx.GraphModule, directory: Path) -> list[str]:
    """Write a module's adapters as PEFT checkpoints: one in `directory`, or several below it with their order.

    Returns:
        What the installed PEFT leaves out of them.

    Raises:
        WeightError: adaptc did not compile the module, or it has no adapter.
        ProofError: a tensor is not read back as it was written.
    """
    written, values = compacted(records(module), tensors_of(module))
    meta = module.meta[META]
    return save_and_read(written, values, directory, meta["base"], recorded_model(meta.get(MODEL, {})))


def save_and_read(
    records: Sequence[AdapterRecord],
    values: Mapping[str, torch.Tensor],
    directory: Path,
    base: Mapping[str, str],
    model: nn.Module | None,
) -> list[str]:
    """Save adapters as checkpoints, and read them back.

    Args:
        records: of the adapters.
        values: name -> tensor, those of their heads among them.
        directory: of one checkpoint, or of several below it.
        base: what a checkpoint says of the base.
        model: the base where it is a model of transformers.

    Returns:
        What the installed PEFT leaves out of them.

    Raises:
        ProofError: a tensor is not read back as it was written.
    """
    save(records, values, directory, base)
    notes: list[str] = []
    for path, members in zip(directories(directory), group(records), strict=True):
        for name, value in assign(read(path), members).items():
            if not torch.equal(value, values[name].detach().to("cpu", value.dtype)):
                raise ProofError(f"{name} was not read back as it was written")
        notes += left_out(path, [m for member in members for m in member.modules], model)
    return notes


class AlternativeFiles:
    """Checkpoints of the alternatives of modules."""

    def save(self, module: SwitchedModule, name: str, directory: Path) -> None:
        """Write an alternative, without what is always on, as `save_adapter_of` writes all."""
        written, values = compacted(own_records(module, name), tensors_of(module))
        meta = module.meta[META]
        save_and_read(written, values, directory, meta["base"], recorded_model(meta.get(MODEL, {})))

    def load(self, module: SwitchedModule, name: str, directory: Path) -> None:
        """Load an alternative, without what is always on, as `load_adapter_into` loads all.

        Raises:
            WeightError: the checkpoint does not fit it.
        """
        load_adapter_into(module, of_name(directory, name), held=own_records(module, name))


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers of a module by their names."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
