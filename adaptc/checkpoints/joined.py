"""Methods that share another method's checkpoint under keys of their own, as PEFT's LoRA takes trained tokens along."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from adaptc.checkpoints.adapter import Checkpoint
from adaptc.checkpoints.config_file import CONFIG, config_error, invalid_values
from adaptc.checkpoints.records import AdapterRecord
from adaptc.errors import InputError, WeightError
from adaptc.methods.method import METHODS, Method, options_of
from adaptc.methods.peft_format import PeftFormat


@dataclass(frozen=True)
class Joined:
    """A method in another's checkpoint.

    Attributes:
        method: the method.
        options: its options.
        modules: the modules whose tensors the checkpoint holds.
        names: endings of the names of modules that the configuration names.
    """

    method: type[Method[Any]]
    options: dict[str, Any]
    modules: tuple[str, ...]
    names: tuple[str, ...]


def joined_methods(checkpoint: Checkpoint, host: PeftFormat[Any]) -> list[Joined]:
    """The methods that a configuration declares beside the one that it is of.

    Args:
        checkpoint: the checkpoint.
        host: the format of its configuration.

    Raises:
        WeightError: an option has no value that the method takes.
    """
    declared: list[Joined] = []
    for cls in METHODS.values():
        format = cls.peft
        if format is None or not format.joined_as or format.joins not in host.hosts:
            continue
        key, path = format.joins, checkpoint.path / CONFIG
        value = checkpoint.config.get(key)
        if value is None or key in checkpoint.ignored:
            continue
        try:
            options, names = format.joined(value)
            method = TypeAdapter(cls).validate_json(json.dumps(options), strict=True)
        except InputError as error:
            raise config_error(path, (key,), error.message) from None
        except ValidationError as error:
            raise invalid_values(path, error, lambda _, key=key: (key,)) from None
        modules = checkpoint.joined.get(key, ())
        declared.append(Joined(cls, options_of(method), modules, tuple(names)))
    return declared


def check_joined(checkpoint: Checkpoint, host: PeftFormat[Any], records: Sequence[AdapterRecord]) -> None:
    """Check that the methods that joined a checkpoint compute the same as those that were inserted.

    Raises:
        WeightError: an option differs.
    """
    inserted = {record.method: record for record in records}
    for joined in joined_methods(checkpoint, host):
        record = inserted.get(joined.method.name)
        key = joined.method.peft.joins if joined.method.peft is not None else None
        if record is not None and key is not None and options_of(record.instance) != joined.options:
            raise WeightError(
                f"{checkpoint.path}: {key} is {checkpoint.config[key]} there, but the module was compiled with "
                f"{record.options}; compile it with `adapter: {checkpoint.path}`"
            )
