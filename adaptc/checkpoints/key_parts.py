"""The parts of a checkpoint's keys that are no names in the model: PEFT's, and those of wrappers."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

ROOT = "base_model."
PREFIX = f"{ROOT}model."
"""The prefix of every key; that of a tensor which belongs to no module is `ROOT` alone."""
NESTED = frozenset({"base_layer", "original_module", "token_adapter"})
"""The attributes in which PEFT keeps a module that it wraps."""
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_original_module", "module")
"""The attributes in which torch.compile, FSDP, activation checkpointing, Fabric and DDP keep the model."""
_LEADING = re.compile(r"^((?:{0})\.)*base_model\.((?:{0})\.)*model\.".format("|".join(WRAPPERS)))


def with_plain_prefix(key: str) -> str:
    """A key whose prefix is PEFT's, without the wrappers in front of it and in it."""
    return _LEADING.sub(PREFIX, key)


def in_prefix(part: str, key: str) -> bool:
    """Whether a wrapper's part stands in a key's prefix."""
    prefix = _LEADING.match(key)
    return prefix is not None and part in prefix[0].split(".")


def taken_out(part: str) -> str:
    """The note on a part that was taken out of the keys of a checkpoint."""
    return f"the wrapper's part {part!r} was taken out of its keys"


def modules_holding(weights: Iterable[str]) -> frozenset[str]:
    """The names of the modules that hold weights of these names, and of those around them."""
    parts = [name.split(".") for name in weights]
    return frozenset(".".join(part[:end]) for part in parts for end in range(1, len(part)))


def base_name(key: str) -> str:
    """The name that a tensor of the base has there, of its key in a checkpoint."""
    return ".".join(part for part in key.split(".") if part not in NESTED)


def behind_module(key: str, modules: Collection[str]) -> list[str]:
    """The parts of a key behind the name of its module, the longest that the model has; all parts if it has none.

    Args:
        key: the key; one of `ROOT` belongs to the model itself.
        modules: the names of the model's modules.
    """
    parts = [part for part in key.removeprefix(ROOT).split(".") if part not in NESTED]
    end = next((n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in modules), 0)
    return parts[end:]
