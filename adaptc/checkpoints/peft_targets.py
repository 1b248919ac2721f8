"""The modules that PEFT's `adapter_config.json` names, as patterns of a spec."""

from __future__ import annotations

import re

from adaptc.checkpoints.adapter import Checkpoint, list_of
from adaptc.checkpoints.config_file import CONFIG, config_error
from adaptc.errors import WeightError
from adaptc.ir.selection import ALL_LINEAR
from adaptc.methods.site import OUT_PROJECTION


def named_modules(checkpoint: Checkpoint) -> list[str]:
    """Regexes of the modules in a checkpoint's `target_modules`."""
    return [pattern.removeprefix("re:") for pattern in module_patterns(checkpoint, "target_modules")]


def module_patterns(checkpoint: Checkpoint, key: str) -> list[str]:
    """Patterns for a key by which PEFT names modules: text is a regex on the full name, a list holds endings of names.

    Raises:
        WeightError: the value is no regular expression and no list of names.
    """
    value: object = checkpoint.config.get(key)
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            message = f"{value!r} is not a regular expression: {error}"
            raise config_error(checkpoint.path / CONFIG, (key,), message) from None
        return [value if value == ALL_LINEAR else f"re:{value}"]
    if value is None:
        return []
    names = list_of(str, value)
    if names is None:
        raise WeightError(
            f"{checkpoint.path / CONFIG}: {key}: expected text or a list of names, got {value!r}"
        )
    return [f"re:(.*\\.)?{re.escape(name)}" for name in names]


def with_output_projections(patterns: list[str]) -> list[str]:
    """The patterns, and those of output projections: PEFT adapts an nn.MultiheadAttention with its projection."""
    regexes = [p.removeprefix("re:") for p in patterns if p != ALL_LINEAR]
    return patterns + [f"re:(?:{regex}){re.escape(OUT_PROJECTION)}" for regex in regexes]


def target_of(checkpoint: Checkpoint) -> list[str]:
    """The patterns of the modules and parameters that a configuration targets.

    Raises:
        WeightError: it targets none, or a key has no value that PEFT takes.
    """
    named = module_patterns(checkpoint, "target_modules")
    if isinstance(checkpoint.config.get("target_modules"), list):
        named = _in_layers(checkpoint, named)
    patterns = with_output_projections(named) + module_patterns(checkpoint, "target_parameters")
    if not patterns:
        message = "its configuration names no target_modules"
        raise config_error(checkpoint.path / CONFIG, ("target_modules",), message)
    return patterns


def _in_layers(checkpoint: Checkpoint, patterns: list[str]) -> list[str]:
    """The patterns of `target_modules` limited to `layers_to_transform`; full names are taken as they are.

    A layer's number is the first numbered part of a name after two other parts, or after one in `layers_pattern`.

    Raises:
        WeightError: one of the two keys has no value that PEFT takes.
    """
    layers: object = checkpoint.config.get("layers_to_transform")
    layer_lists: object = checkpoint.config.get("layers_pattern")
    if layers is None or layers == []:
        return patterns
    numbers = list_of(int, [layers] if isinstance(layers, int) else layers)
    if numbers is None:
        raise WeightError(
            f"{checkpoint.path / CONFIG}: layers_to_transform: expected layer numbers, got {layers!r}"
        )
    number = f"(?:{'|'.join(map(str, numbers))})"
    names = list_of(str, [layer_lists] if isinstance(layer_lists, str) and layer_lists else layer_lists or [])
    if names is None:
        raise WeightError(f"{checkpoint.path / CONFIG}: layers_pattern: expected names, got {layer_lists!r}")
    after_name = [rf"(?:(?!(?:{name})\.\d+\.)[^.]*\.)*(?:{name})\.{number}\." for name in names]
    prefix = "|".join(after_name) or rf"[^.]*\.[^.]*\.(?:(?!\d+\.)[^.]*\.)*{number}\."
    endings = (pattern.removeprefix("re:(.*\\.)?") for pattern in patterns)
    return [rf"re:(?:{ending}|(?={prefix}).*\.{ending})" for ending in endings]
