"""How a Hugging Face configuration is set before its model is traced: one table, no model by its name."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast


@dataclass(frozen=True)
class Setting:
    """An attribute of a configuration whose value a graph cannot follow, and the value it is set to.

    Attributes:
        attribute: a regex on the attribute's name.
        replaced: whether a value must be replaced.
        value: what it is set to.
        reason: why, for the note that the person reads.
    """

    attribute: str
    replaced: Callable[[Any], bool]
    value: object
    reason: str


SETTINGS = (
    Setting(r"\w*layer_?drop", bool, 0.0, "a graph has a fixed number of layers"),
    Setting(r"apply_spec_augment", bool, False, "its masks are drawn in Python, outside of the graph"),
    Setting(
        r"_experts_implementation",
        lambda value: value == "eager",
        "grouped_mm",
        "the eager loop runs over the experts that were hit, which only the data tells",
    ),
)
"""The settings that are applied before a model is built; each change becomes a note of the base."""


def set_for_tracing(config: Any) -> list[str]:
    """Apply `SETTINGS` to a configuration and its parts, in place.

    Returns:
        A note for each change.
    """
    notes: list[str] = []
    for part in parts_of(config):
        if hasattr(part, "use_cache"):
            part.use_cache = False  # a graph has no cache yet; nothing that a trace computes depends on it
        for key, value in list(cast(dict[str, Any], vars(part)).items()):
            attribute = key.removesuffix("_internal")
            for setting in SETTINGS:
                if re.fullmatch(setting.attribute, attribute) and setting.replaced(value):
                    setattr(part, attribute, setting.value)
                    notes.append(f"{attribute.lstrip('_')} is set to {setting.value}: {setting.reason}")
    return list(dict.fromkeys(notes))


def alternative_notes(model: Any) -> list[str]:
    """Notes on what a built model has chosen where a graph could follow another choice: how experts are computed."""
    can = getattr(model, "_can_set_experts_implementation", None)
    if can is None or not can():
        return []
    chosen = model.config._experts_implementation
    return [
        f"experts_implementation is {chosen}; grouped_mm sorts tokens by their expert, batched_mm copies an expert's "
        "weights for each token (set it in base.config)"
    ]


def parts_of(config: Any) -> list[Any]:
    """A configuration and the configurations inside it, such as those of a text model and an image model."""
    values = cast(dict[str, Any], vars(config)).values()
    return [config, *(value for value in values if hasattr(value, "to_dict"))]
