"""Read PEFT's `adapter_config.json` as an entry: which method, which options, which modules."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from pydantic import TypeAdapter, ValidationError

from adaptc.checkpoints.adapter import Checkpoint
from adaptc.checkpoints.config_file import CONFIG, config_error, invalid_values
from adaptc.checkpoints.config_keys import check_other_keys
from adaptc.checkpoints.peft_targets import module_patterns, named_modules, target_of, with_output_projections
from adaptc.checkpoints.records import AdapterRecord
from adaptc.checkpoints.tied import ON_ALIAS
from adaptc.errors import WeightError, got
from adaptc.methods.method import METHODS, Method, options_of
from adaptc.methods.peft_format import PeftFormat
from adaptc.patterns import literal
from adaptc.spec.yaml_text import Loc

METHOD, OPTIONS = "adaptc_method", "adaptc_options"
"""The keys of adaptc's own format, for methods that PEFT does not have."""
OWN_FORMAT = PeftFormat[Any](None, options={"method": METHOD, "options": OPTIONS, "on_alias": ON_ALIAS})


@dataclass(frozen=True)
class Declared:
    """What a checkpoint's configuration declares.

    Attributes:
        method: the method.
        options: its options.
        target: patterns of the modules and parameters that it adapts.
        exclude: patterns of those that it does not.
        as_stored: patterns of the parameters that are read as they are stored, (out, in) or (experts, out, in): PEFT's
            `target_parameters`.
    """

    method: type[Method[Any]]
    options: dict[str, Any]
    target: Sequence[str]
    exclude: tuple[str, ...]
    as_stored: tuple[str, ...] = ()


def declared(checkpoint: Checkpoint, prefer: str = "") -> Declared:
    """Read a checkpoint's configuration.

    Args:
        checkpoint: the checkpoint.
        prefer: the method to read it as, where PEFT stores several methods alike.

    Raises:
        WeightError: adaptc does not have the method, or an option has no value that the method takes, or would change
            the result and is not read.
    """
    config = checkpoint.config
    if config.get(METHOD) is not None:
        return _in_adaptc_format(checkpoint)
    cls, format = _method_of(checkpoint, prefer)
    check_other_keys(checkpoint, cls.name, format)
    _check_layers(checkpoint)
    options = {ours: config[theirs] for ours, theirs in format.options.items() if theirs in config}
    for name in format.modules:
        options[name] = tuple(module_patterns(checkpoint, format.options[name]))
    shapes = {key: tensor.shape for key, tensor in checkpoint.tensors.items()}
    options = cls.trained_options(format.read(format.stored(options, shapes)))
    spelled = format.options
    options = _checked(checkpoint, cls, options, lambda loc: (spelled.get(str(loc[0]), loc[0]), *loc[1:]))
    names = [literal(module) for module in checkpoint.saved_modules]
    saved = [p for m in names for p in (m, f"{m}.*")]
    exclude = (*with_output_projections(module_patterns(checkpoint, "exclude_modules")), *saved)
    target = ["*"] if cls.everywhere else target_of(checkpoint)
    return Declared(
        cls, options, target, exclude, as_stored=tuple(module_patterns(checkpoint, "target_parameters"))
    )


def _method_of(checkpoint: Checkpoint, prefer: str) -> tuple[type[Method[Any]], PeftFormat[Any]]:
    """The method of a configuration in PEFT's format, and that format.

    Raises:
        WeightError: adaptc has no method of its type.
    """
    config = checkpoint.config
    formats = {cls.name: cls.peft for cls in METHODS.values() if cls.peft is not None and cls.peft.type}
    fitting = {name: format for name, format in formats.items() if _fits(checkpoint, format)}
    if not fitting:
        types = sorted({str(format.type) for format in formats.values()})
        given = config.get("peft_type")
        message = f"{given!r} is not a method this adaptc has" if given else "required: the method's name"
        raise config_error(
            checkpoint.path / CONFIG, ("peft_type",), f"{message}; it reads {', '.join(types)}"
        )
    most = max(fitting, key=lambda name: len(fitting[name].options))  # the method that reads most of the keys
    name = prefer if prefer in fitting else most
    return METHODS[name], fitting[name]


def _fits(checkpoint: Checkpoint, format: PeftFormat[Any]) -> bool:
    """Whether a configuration is of this format: its `peft_type` and all keys that are fixed.

    Raises:
        WeightError: one of the fixed keys is not true, false or null.
    """
    config = checkpoint.config
    if format.type != config.get("peft_type"):
        return False
    for key in format.fixed:
        if not isinstance(config.get(key), bool | None):
            raise config_error(
                checkpoint.path / CONFIG, (key,), f"expected true or false, got {got(config[key])}"
            )
    return all(bool(config.get(key)) == bool(value) for key, value in format.fixed.items())


def _check_layers(checkpoint: Checkpoint) -> None:
    """Check that what numbers layers has something to number, as PEFT does.

    Raises:
        WeightError: there are layers without a list of modules, or a pattern without layers.
    """
    config, path = checkpoint.config, checkpoint.path / CONFIG
    layers = config.get("layers_to_transform")
    if config.get("layers_pattern") and layers is None:
        raise config_error(path, ("layers_pattern",), "has no meaning without layers_to_transform")
    if isinstance(config.get("target_modules"), str) and layers not in (None, []):
        message = "needs a list of names in target_modules: a regular expression can name the layers itself"
        raise config_error(path, ("layers_to_transform",), message)


def check_options(checkpoint: Checkpoint, record: AdapterRecord) -> None:
    """Check that an adapter with a checkpoint's options computes the same as the one inserted.

    Raises:
        WeightError: the checkpoint is of another method, or an option differs.
    """
    entry = declared(checkpoint, prefer=record.method)
    if entry.method.name != record.method:
        raise WeightError(
            f"{checkpoint.path}: a {entry.method.name} adapter, but the module holds {record.method}"
        )
    readings = [entry.options]
    if entry.method.peft is not None:
        readings.append(entry.method.peft.computed(entry.options, named_modules(checkpoint)))
    differing = [_differing(entry.method, options, record) for options in readings]
    if all(differing):
        key = differing[0]
        raise WeightError(
            f"{checkpoint.path}: {key} is {entry.options[key]!r} there, but the module was compiled with "
            f"{record.options.get(key)!r}; compile it with that option, or with `adapter: {checkpoint.path}`"
        )


def _differing(method: type[Method[Any]], options: Mapping[str, object], record: AdapterRecord) -> str:
    """The first option whose value differs from the one that the module was compiled with; "" if none does."""
    compiled = method.trained_options(dict(record.options))
    for key, value in options.items():
        plain = json.loads(json.dumps(value, default=list))  # as a record has it, in tuples within tuples too
        per_layer = method.peft is not None and key in method.peft.modules
        if key not in method.while_training and not per_layer and plain != compiled.get(key):
            return key
    return ""


def _in_adaptc_format(checkpoint: Checkpoint) -> Declared:
    """Read the configuration of a checkpoint in adaptc's own format.

    Raises:
        WeightError: the method is not installed, or a key has no value that it can have.
    """
    config, path = checkpoint.config, checkpoint.path / CONFIG
    name, target = config[METHOD], config.get("target_modules")
    given: object = config.get(OPTIONS, {})
    if not isinstance(name, str) or name not in METHODS:
        message = f"method {name!r} is not installed; install the package that has it"
        raise config_error(path, (METHOD,), message)
    check_other_keys(checkpoint, name, OWN_FORMAT)
    if not isinstance(given, dict):
        raise config_error(path, (OPTIONS,), f"expected a mapping, got {got(given)}")
    if not isinstance(target, list) or not target:
        raise config_error(path, ("target_modules",), "required: the modules that it adapts")
    cls = METHODS[name]
    checked = _checked(checkpoint, cls, cast(dict[str, Any], given), lambda loc: (OPTIONS, *loc))
    options = cls.trained_options(checked)
    return Declared(cls, options, tuple(str(pattern) for pattern in cast(list[object], target)), ())


def _checked(
    checkpoint: Checkpoint, cls: type[Method[Any]], options: dict[str, Any], place: Callable[[Loc], Loc]
) -> dict[str, Any]:
    """The options as the method takes them, validated as those of a spec are.

    Args:
        checkpoint: the checkpoint.
        cls: the method.
        options: its options, in the values that JSON has.
        place: the place in the configuration of an option, by its name.

    Raises:
        WeightError: one has a value that the method does not take.
    """
    try:
        return options_of(TypeAdapter(cls).validate_json(json.dumps(options), strict=True))
    except ValidationError as error:
        raise invalid_values(checkpoint.path / CONFIG, error, place) from None
