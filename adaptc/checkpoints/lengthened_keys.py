"""Keys that are longer than PEFT's: wrappers of the model, and the adapter's own name, are taken out of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from adaptc.checkpoints.adapter import Checkpoint
from adaptc.checkpoints.key_parts import ROOT, WRAPPERS, behind_module, taken_out
from adaptc.weights import Weight

LEAVES = frozenset({"weight", "bias"})
"""The names of a layer's own tensors, which follow the words of a method."""


def shortened(checkpoint: Checkpoint, modules: Collection[str]) -> Checkpoint:
    """A checkpoint whose keys have no part that only a wrapper or the adapter's name put there.

    Args:
        checkpoint: the checkpoint.
        modules: the names of the base's modules; a part that one of them has is kept.
    """
    of_model = {part for module in modules for part in module.split(".")}
    wrappers = [part for part in WRAPPERS if part not in of_model]
    renamed = {key: _without(key, wrappers) for key in checkpoint.tensors}
    adapter = "" if checkpoint.in_adaptc_format else _adapter_name(renamed.values(), modules)
    renamed = {key: _without_name(name, adapter, modules) for key, name in renamed.items()}
    taken = [part for part in wrappers if any(part in key.split(".") for key in checkpoint.tensors)]
    notes = [taken_out(part) for part in taken]
    notes += [f"the adapter's name {adapter!r} was taken out of its keys"] if adapter else []
    if not notes or len({*renamed.values()}) < len(renamed):
        return checkpoint
    tensors: Mapping[str, Weight] = {name: checkpoint.tensors[key] for key, name in renamed.items()}
    saved = tuple(_without(module, wrappers) for module in checkpoint.saved_modules)
    return replace(checkpoint, tensors=tensors, saved_modules=saved, notes=(*checkpoint.notes, *notes))


def _without(key: str, parts: Collection[str]) -> str:
    return ".".join(part for part in key.split(".") if part not in parts)


def _adapter_name(keys: Collection[str], modules: Collection[str]) -> str:
    """What stands behind the first word of every tensor of the adapter; "" where that is no name of its own."""
    rests = [rest for key in keys if (rest := _rest(key, modules)) and rest[0] not in LEAVES]
    names = {rest[1] if len(rest) - (rest[-1] in LEAVES) == 2 else "" for rest in rests}
    name = names.pop() if len(names) == 1 else ""
    return "" if name in LEAVES else name


def _without_name(key: str, name: str, modules: Collection[str]) -> str:
    """A key without the adapter's name in it."""
    rest = _rest(key, modules)
    if not name or rest[1:2] != [name]:
        return key
    before, _, after = key.rpartition(f".{rest[0]}.{name}")
    return f"{before}.{rest[0]}{after}"


def _rest(key: str, modules: Collection[str]) -> list[str]:
    """The parts of a key behind the name of its module; [] if the model has no such module."""
    rest = behind_module(key, modules)
    return rest if rest != behind_module(key, ()) or key.startswith(ROOT) else []
