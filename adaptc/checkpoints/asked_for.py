"""What an adapter asks for: the lines of an error that set it beside what the base has."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from adaptc.checkpoints.adapter import Checkpoint
from adaptc.checkpoints.key_parts import PREFIX, ROOT, base_name, behind_module

TARGETS = (
    *("target_modules", "target_parameters", "exclude_modules", "modules_to_save", "trainable_token_indices"),
    "layers_to_transform",
)
"""The keys of a configuration that say where an adapter sits."""
MOST = 80
"""How many characters of a value are shown."""


@dataclass(frozen=True)
class Layers:
    """What of a base is set beside an adapter.

    Attributes:
        modules: the names of its modules.
        vocabularies: those whose size is that of the vocabulary -> how many words this base has.
    """

    modules: Collection[str] = frozenset()
    vocabularies: dict[str, int] = field(default_factory=dict[str, int])


def asked_for(checkpoint: Checkpoint) -> list[str]:
    """Lines on what the configuration of an adapter names, and on what its file holds."""
    config = checkpoint.config
    stated = [
        f"its {key}: {_shortened(json.dumps(config[key]))}"
        for key in TARGETS
        if config.get(key) not in (None, [], {})
    ]
    keys = [spelled(key) for key in checkpoint.tensors]
    more = f", ... ({len(keys)})" if len(keys) > 3 else ""
    return [*stated, f"its tensors: {', '.join(keys[:3]) or 'none'}{more}"]


def in_base(key: str, layers: Layers) -> list[str]:
    """A line on what this base has in the place of a tensor that no layer takes; none where the base is not known."""
    if not layers.modules or key.startswith(ROOT):
        return []
    rest = behind_module(key, layers.modules)
    module = _module(key, rest)
    if len(rest) <= 2 and module:
        return [f"this base has {module}, and the configuration does not give it such a tensor"]
    inside = f"{module}." if module else ""
    children = dict.fromkeys(
        name.removeprefix(inside).partition(".")[0] for name in layers.modules if name.startswith(inside)
    )
    shown = _shortened(", ".join(sorted(children, key=_natural)))
    return [f"this base has no {inside}{rest[0]}; {module or 'it'} holds {shown or 'no module'}"]


def spelled(key: str, bare: bool = False) -> str:
    """A key as it is spelled in the file, with PEFT's prefix.

    Args:
        key: the key without PEFT's prefix.
        bare: the file holds virtual tokens, whose keys have a shorter prefix.
    """
    if bare:
        return key.removeprefix(ROOT) if key.startswith(ROOT) else ROOT + key
    return key if key.startswith(ROOT) else PREFIX + key


def quoted(keys: Iterable[str], most: int = 3) -> str:
    """The first keys as they are spelled in the file."""
    return ", ".join(repr(spelled(key)) for key in [*keys][:most])


def _module(key: str, rest: list[str]) -> str:
    parts = base_name(key).split(".")
    return ".".join(parts[: len(parts) - len(rest)])


def _natural(name: str) -> tuple[int, str]:
    return (int(name), "") if name.isdigit() else (-1, name)


def _shortened(text: str) -> str:
    return text if len(text) <= MOST else f"{text[: MOST - 3]}..."
