"""How a Hugging Face configuration is set before its model is traced: one table, no model by its name."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import nn


@dataclass(frozen=True)
class Setting:
    """An attribute of a configuration whose value a graph cannot follow, and the value it is set to.

    Attributes:
        attribute: a regex on the attribute's name.
        replaced: whether a value must be replaced.
        value: what it is set to.
        reason: why, for the note that the person reads.
        has: the method of a model that says whether it has such a part at all; "" where every model may.
    """

    attribute: str
    replaced: Callable[[Any], bool]
    value: object
    reason: str
    has: str = ""


CACHES = ("use_cache", "use_mems_eval")
"""The attributes that say whether a model returns what the next call could use."""
EXPERTS = "_can_set_experts_implementation"
SETTINGS = (
    Setting(r"\w*layer_?drop", bool, 0.0, "a graph has a fixed number of layers"),
    Setting(r"apply_spec_augment", bool, False, "its masks are drawn in Python, outside of the graph"),
    Setting(
        r"_experts_implementation",
        lambda value: value == "eager",
        "grouped_mm",
        "the eager loop runs over the experts that were hit, which only the data tells",
        has=EXPERTS,
    ),
)
"""The settings that are applied before a model is built; each change becomes a note of the base."""


def set_for_tracing(config: object, model: nn.Module | None = None) -> list[str]:
    """Apply `SETTINGS` to a configuration and its parts, in place.

    Args:
        config: the configuration.
        model: the model, where it is built already; its modules are set too.

    Returns:
        A note for each change.
    """
    modules = list(model.modules()) if model is not None else []
    # some parts of a model have copies, such as T5's stacks
    copies: list[Any] = [module.config for module in modules if hasattr(module, "config")]
    for part in (part for each in (config, *copies) for part in parts_of(each)):
        for name in CACHES:
            if hasattr(part, name):
                setattr(part, name, False)  # nothing that a trace computes depends on it
    parts = [*parts_of(config), *modules]
    settings = [s for s in SETTINGS if model is None or not s.has or _has(model, s.has)]
    return list(dict.fromkeys(note for part in parts for note in _apply(settings, part)))


def _apply(settings: Sequence[Setting], part: Any) -> list[str]:
    """Apply settings to the attributes of one object; a note for each change."""
    notes: list[str] = []
    for key, value in list(cast(dict[str, Any], vars(part)).items()):
        attribute = key.removesuffix("_internal")
        for setting in settings:
            if re.fullmatch(setting.attribute, attribute) and setting.replaced(value):
                setattr(part, attribute, setting.value)
                notes.append(f"{attribute.lstrip('_')} is set to {setting.value}: {setting.reason}")
    return notes


def alternative_notes(model: Any) -> list[str]:
    """Notes on what a built model has chosen where a graph could follow another choice: how experts are computed."""
    if not _has(model, EXPERTS):
        return []
    chosen = model.config._experts_implementation
    return [
        f"experts_implementation is {chosen}; grouped_mm sorts tokens by their expert, batched_mm copies an expert's "
        "weights for each token (set it in base.config)"
    ]


def _has(model: object, method: str) -> bool:
    """Whether a model has a part, as its own method says; older ones have no such method."""
    return hasattr(model, method) and getattr(model, method)()


def parts_of(config: Any) -> list[Any]:
    """A configuration and the configurations inside it, such as those of a text model and an image model."""
    values = cast(dict[str, Any], vars(config)).values()
    return [config, *(value for value in values if hasattr(value, "to_dict"))]
