"""The keys of `adapter_config.json` that a method does not read: without effect, refused by name, or unknown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, replace
from typing import Any

from adaptc.checkpoints.adapter import Checkpoint
from adaptc.checkpoints.config_file import CONFIG, CommonKeys, config_error
from adaptc.errors import AdaptcError, WeightError, nearest, unknown
from adaptc.methods.peft_format import PeftFormat
from adaptc.optional import optional

UNSET: tuple[object, ...] = (None, [], {})
"""What no trainer means anything by."""


def ignoring(checkpoints: Sequence[Checkpoint], ignore: Sequence[str]) -> list[Checkpoint]:
    """Checkpoints whose configurations are read as if they did not have some options.

    Args:
        checkpoints: the checkpoints.
        ignore: the options; one of the configurations must have each.

    Raises:
        WeightError: no configuration has one of them.
    """
    names = sorted({key for checkpoint in checkpoints for key in checkpoint.config})
    for key in ignore:
        if key not in names:
            raise WeightError(unknown("option", key, names, listed=()), f"no {CONFIG} there has it")
    return [replace(c, ignored=tuple(key for key in ignore if key in c.config)) for c in checkpoints]


def check_other_keys(checkpoint: Checkpoint, name: str, format: PeftFormat[Any]) -> None:
    """Check that a configuration has no key that changes the result and that the method does not read.

    Args:
        checkpoint: the checkpoint.
        name: the method's name.
        format: how PEFT spells the method.

    Raises:
        WeightError: it has one, or one that nobody knows; or `ignore` names one that is read.
    """
    neutral = format.neutral_values
    read = {*CommonKeys.model_fields, *format.keys, *format.ignored}
    for key in checkpoint.ignored:
        if key in read:
            raise WeightError(
                f"{checkpoint.path / CONFIG}: {name} reads {key!r}; `ignore` is for options that adaptc does not read"
            )
    defaults: Mapping[str, object] | None = None
    for key, value in checkpoint.config.items():
        if key in checkpoint.ignored or (key in read and key not in neutral):
            continue
        if key in neutral:
            if value not in neutral[key]:
                raise _refused(checkpoint, name, format, key)
        elif value not in UNSET:
            defaults = peft_defaults(format) if defaults is None else defaults
            if key not in defaults or value != defaults[key]:
                raise _unknown(checkpoint, key, [*read, *neutral])


def _refused(checkpoint: Checkpoint, name: str, format: PeftFormat[Any], key: str) -> WeightError:
    """The error about an option that changes what a method computes."""
    path, value = checkpoint.path / CONFIG, checkpoint.config[key]
    if isinstance(value, str) and value.startswith(format.changes_base):
        return config_error(
            path,
            (key,),
            f"initialised by {value!r}, which changes the base's weights too",
            "save it with PEFT's path_initial_model_for_weight_conversion, so that it fits the original base",
        )
    return config_error(
        path,
        (key,),
        f"{_shown(value)} changes what {name} computes, and this adaptc does not read it",
        "expected " + " or ".join(map(_shown, format.neutral_values[key])),
        _way_to_go_on(key),
    )


def _unknown(checkpoint: Checkpoint, key: str, names: list[str]) -> WeightError:
    """The error about an option that nobody knows."""
    return config_error(
        checkpoint.path / CONFIG,
        (key,),
        unknown("option", key, (), close=nearest(key, names, count=1, cutoff=0.75)),
        f"adaptc cannot tell whether {_shown(checkpoint.config[key])} there changes what the adapter computes",
        _way_to_go_on(key),
        at_key=True,
    )


def _way_to_go_on(key: str) -> str:
    return f"to read the adapter as if the option were not there, write in its entry: ignore: [{key}]"


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else f"{text[:57]}..."


def peft_defaults(format: PeftFormat[Any]) -> Mapping[str, object]:
    """The options of a method in the installed PEFT -> their defaults; empty where PEFT is not installed.

    A later PEFT may have options that adaptc does not know. At its default an option says what a configuration without
    it says.
    """
    try:
        configs: Mapping[str, Any] = optional("peft.mapping").PEFT_TYPE_TO_CONFIG_MAPPING
    except AdaptcError:
        return {}
    if format.type is None or format.type not in configs:
        return {}
    options = fields(configs[format.type])
    return {option.name: option.default for option in options if option.default is not MISSING}
