"""Read PEFT's `adapter_config.json` as an entry: which method, which options, which modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from pydantic import TypeAdapter, ValidationError

from adaptc.checkpoints.adapter import CONFIG, Checkpoint
from adaptc.checkpoints.peft_targets import module_patterns, named_modules, target_of, with_output_projections
from adaptc.checkpoints.records import AdapterRecord
from adaptc.checkpoints.tied import TIES
from adaptc.errors import WeightError
from adaptc.methods.method import METHODS, Method, options_of
from adaptc.methods.peft_format import PeftFormat
from adaptc.patterns import literal

DESCRIPTIVE = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "task_type",
        "inference_mode",
        "peft_type",
        "peft_version",
        "target_modules",
        "exclude_modules",
        "modules_to_save",
        "layers_to_transform",
        "layers_pattern",
        "target_parameters",
        "fan_in_fan_out",
        *("num_layers", "num_attention_heads", "token_dim"),
    }
)
"""Keys that say where the adapter sits or comes from, not what it computes."""


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
    if config.get("adaptc_method"):
        return _in_adaptc_format(checkpoint)
    fitting = {cls.name: format for cls, format in _formats() if _fits(format, config)}
    if not fitting:
        types = sorted({str(format.type) for _, format in _formats()})
        raise WeightError(
            f"{checkpoint.path}: peft_type {config.get('peft_type')!r} is not a method this adaptc has; "
            f"it reads {', '.join(types)}"
        )
    most = max(fitting, key=lambda name: len(fitting[name].options))  # the method that reads most of the keys
    cls = METHODS[prefer if prefer in fitting else most]
    format = fitting[cls.name]
    _check_other_keys(checkpoint, cls)
    options = {ours: config[theirs] for ours, theirs in format.options.items() if theirs in config}
    for name in format.modules:
        options[name] = tuple(module_patterns(checkpoint, format.options[name]))
    names = [literal(module) for module in checkpoint.saved_modules]
    saved = [p for m in names for p in (m, f"{m}.*")]
    exclude = (*with_output_projections(module_patterns(checkpoint, "exclude_modules")), *saved)
    target = ["*"] if cls.everywhere else target_of(checkpoint)
    options = _checked(checkpoint, cls, cls.trained_options(format.read(options)))
    return Declared(
        cls, options, target, exclude, as_stored=tuple(module_patterns(checkpoint, "target_parameters"))
    )


def _formats() -> list[tuple[type[Method[Any]], PeftFormat[Any]]]:
    """The methods that PEFT has a checkpoint format for, each with that format."""
    return [(cls, cls.peft) for cls in METHODS.values() if cls.peft is not None and cls.peft.type]


def _fits(format: PeftFormat[Any], config: Mapping[str, Any]) -> bool:
    """Whether a configuration is of this format: its `peft_type` and all keys that are fixed."""
    return format.type == config.get("peft_type") and all(
        bool(config.get(key)) == bool(value) for key, value in format.fixed.items()
    )


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


def _differing(method: type[Method[Any]], options: Mapping[str, Any], record: AdapterRecord) -> str:
    """The first option whose value differs from the one that the module was compiled with; "" if none does."""
    compiled = method.trained_options(dict(record.options))
    for key, value in options.items():
        plain = list(cast(tuple[Any, ...], value)) if isinstance(value, tuple) else value
        per_layer = method.peft is not None and key in method.peft.modules
        if key not in method.while_training and not per_layer and plain != compiled.get(key):
            return key
    return ""


def _in_adaptc_format(checkpoint: Checkpoint) -> Declared:
    """Read the configuration of a checkpoint in adaptc's own format.

    Raises:
        WeightError: the method is not installed, or the configuration names no modules.
    """
    config = checkpoint.config
    cls = METHODS.get(config["adaptc_method"])
    if cls is None:
        raise WeightError(
            f"{checkpoint.path}: method {config['adaptc_method']!r} is not installed; install the package that has it"
        )
    options = _checked(checkpoint, cls, cls.trained_options(dict(config.get("adaptc_options") or {})))
    target: object = config.get("target_modules")
    if not isinstance(target, list) or not target:
        raise WeightError(f"{checkpoint.path / CONFIG}: its configuration names no target_modules")
    return Declared(cls, options, tuple(str(pattern) for pattern in cast(list[object], target)), ())


def _check_other_keys(checkpoint: Checkpoint, cls: type[Method[Any]]) -> None:
    """Check that a configuration has no key that changes the result and that the method does not read.

    Raises:
        WeightError: it has one, or was initialised in a way that changes the base's weights.
    """
    assert cls.peft is not None
    read = DESCRIPTIVE | cls.peft.ignored | set(cls.peft.options.values()) | set(cls.peft.fixed)
    read |= {TIES} if cls.peft.ties else set[str]()
    for key, value in checkpoint.config.items():
        if key in read or key.startswith("init_"):
            continue
        if value and value != "none":
            raise WeightError(
                f"{checkpoint.path}: option {key}: {value!r} changes what {cls.name} computes, "
                "and this adaptc does not read it"
            )
    init = next((v for k, v in checkpoint.config.items() if k.startswith("init_") and isinstance(v, str)), "")
    if init.startswith(cls.peft.changes_base):
        raise WeightError(
            f"{checkpoint.path}: initialised by {init!r}, which changes the base's weights too; save it with PEFT's "
            "path_initial_model_for_weight_conversion, so that it fits the original base"
        )


def _checked(checkpoint: Checkpoint, cls: type[Method[Any]], options: dict[str, Any]) -> dict[str, Any]:
    """The options as the method takes them, validated as those of a spec are.

    Raises:
        WeightError: one has a value that the method does not take; names PEFT's key.
    """
    try:
        return options_of(TypeAdapter(cls).validate_python(options))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        ours = str(first["loc"][0]) if first["loc"] else ""
        key = cls.peft.options.get(ours, ours) if cls.peft else ours
        path = ".".join([key, *map(str, first["loc"][1:])])
        message = first["msg"].lower().replace("input should", "it should")
        raise WeightError(f"{checkpoint.path / CONFIG}: {path}: {message}, got {first['input']!r}") from None
