"""From PEFT's `adapter_config.json` to an entry: which method, which options, which layers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from adaptc.checkpoints.adapter import CONFIG, Checkpoint
from adaptc.checkpoints.records import AdapterRecord
from adaptc.errors import WeightError
from adaptc.ir.selection import ALL_LINEAR
from adaptc.methods.method import METHODS, Method, options_of
from adaptc.methods.peft_format import PeftFormat
from adaptc.methods.site import OUT_PROJECTION

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
"""Keys that say where the adapter sits or came from, not what it computes."""


@dataclass(frozen=True)
class Declared:
    """What a checkpoint's configuration asks for."""

    method: type[Method]
    options: dict[str, Any]
    target: Any
    exclude: tuple[str, ...]
    as_stored: bool = False
    """Parameters are read as they are stored, (out, in) or (experts, out, in), as `target_parameters` does."""


def declared(checkpoint: Checkpoint, prefer: str = "") -> Declared:
    """Read a configuration, of several methods that PEFT stores alike as the preferred one.

    Raises:
        WeightError: adaptc does not know the method, or an option that would change the result.
    """
    config = checkpoint.config
    if config.get("adaptc_method"):
        return _own(checkpoint)
    fitting = {cls.name: format for cls, format in _formats() if _fits(format, config)}
    if not fitting:
        known = sorted({str(format.type) for _, format in _formats()})
        raise WeightError(
            f"{checkpoint.path}: peft_type {config.get('peft_type')!r} is not a method this adaptc has; "
            f"it reads {', '.join(known)}"
        )
    most = max(fitting, key=lambda name: len(fitting[name].options))  # that reads most of what is said
    cls = METHODS[prefer if prefer in fitting else most]
    format = fitting[cls.name]
    _check_rest(checkpoint, cls)
    options = {ours: config[theirs] for ours, theirs in format.options.items() if theirs in config}
    for name in format.modules:
        options[name] = tuple(_patterns(checkpoint, format.options[name]))
    saved = [p for m in checkpoint.saved_modules for p in (m, f"*.{m}", f"{m}.*", f"*.{m}.*")]
    exclude = (*_attention_whole(_patterns(checkpoint, "exclude_modules")), *saved)
    target = ["*"] if cls.everywhere else _target(checkpoint)
    options = _checked(checkpoint, cls, cls.trained_options(format.read(options)))
    return Declared(cls, options, target, exclude, as_stored=bool(config.get("target_parameters")))


def _formats() -> list[tuple[type[Method], PeftFormat[Any]]]:
    """The methods that have a checkpoint of PEFT's, and how it is spelled."""
    return [(cls, cls.peft) for cls in METHODS.values() if cls.peft is not None and cls.peft.type]


def _fits(format: PeftFormat[Any], config: Mapping[str, Any]) -> bool:
    return format.type == config.get("peft_type") and all(
        bool(config.get(key)) == bool(value) for key, value in format.fixed.items()
    )


def check_options(checkpoint: Checkpoint, record: AdapterRecord) -> None:
    """Check that a checkpoint's options give what the inserted adapter computes.

    Raises:
        WeightError: it is of another method, or an option differs.
    """
    found = declared(checkpoint, prefer=record.method)
    if found.method.name != record.method:
        raise WeightError(
            f"{checkpoint.path}: a {found.method.name} adapter, but the module holds {record.method}"
        )
    as_read = [found.options]
    if found.method.peft is not None:
        as_read.append(found.method.peft.computed(found.options, named_modules(checkpoint)))
    differing = [_differing(found.method, options, record) for options in as_read]
    if all(differing):
        key = differing[0]
        raise WeightError(
            f"{checkpoint.path}: {key} is {found.options[key]!r} there, but the module was compiled with "
            f"{record.options.get(key)!r}; compile it with that option, or with `adapter: {checkpoint.path}`"
        )


def named_modules(checkpoint: Checkpoint) -> list[str]:
    """Regexes of the modules that a checkpoint names."""
    return [pattern.removeprefix("re:") for pattern in _patterns(checkpoint, "target_modules")]


def _differing(method: type[Method], options: Mapping[str, Any], record: AdapterRecord) -> str:
    """The first option that the module was compiled with another value of; "" if there is none."""
    known = method.trained_options(dict(record.options))
    for key, value in options.items():
        plain = list(value) if isinstance(value, tuple) else value
        per_layer = method.peft is not None and key in method.peft.modules
        if key not in method.while_training and not per_layer and plain != known.get(key):
            return key
    return ""


def _own(checkpoint: Checkpoint) -> Declared:
    config = checkpoint.config
    cls = METHODS.get(config["adaptc_method"])
    if cls is None:
        raise WeightError(
            f"{checkpoint.path}: method {config['adaptc_method']!r} is not installed; install the package that has it"
        )
    options = _checked(checkpoint, cls, cls.trained_options(dict(config.get("adaptc_options") or {})))
    target = config.get("target_modules")
    if not isinstance(target, list) or not target:
        raise WeightError(f"{checkpoint.path / CONFIG}: its configuration names no target_modules")
    return Declared(cls, options, tuple(str(pattern) for pattern in target), ())


def _check_rest(checkpoint: Checkpoint, cls: type[Method]) -> None:
    assert cls.peft is not None
    read = DESCRIPTIVE | cls.peft.ignored | set(cls.peft.options.values()) | set(cls.peft.fixed)
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


def _checked(checkpoint: Checkpoint, cls: type[Method], options: dict[str, Any]) -> dict[str, Any]:
    """The options as the method takes them, held against the same bounds as in a spec."""
    try:
        return options_of(TypeAdapter(cls).validate_python(options))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        ours = str(first["loc"][0]) if first["loc"] else ""
        key = cls.peft.options.get(ours, ours) if cls.peft else ours
        place = ".".join([key, *map(str, first["loc"][1:])])
        words = first["msg"].lower().replace("input should", "it should")
        raise WeightError(f"{checkpoint.path / CONFIG}: {place}: {words}, got {first['input']!r}") from None


def _patterns(checkpoint: Checkpoint, key: str) -> list[str]:
    """PEFT's way to name modules: text is a regex on the full name, an item of a list the name's ending."""
    value = checkpoint.config.get(key)
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise WeightError(
                f"{checkpoint.path / CONFIG}: {key}: {value!r} is not a regular expression: {error}"
            ) from None
        return [value if value == ALL_LINEAR else f"re:{value}"]
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise WeightError(
            f"{checkpoint.path / CONFIG}: {key}: expected text or a list of names, got {value!r}"
        )
    return [f"re:(.*\\.)?{re.escape(name)}" for name in value]


def _attention_whole(patterns: list[str]) -> list[str]:
    """PEFT adapts nn.MultiheadAttention whole: naming it, or leaving it out, means its output projection too."""
    regexes = [p.removeprefix("re:") for p in patterns if p != ALL_LINEAR]
    return patterns + [f"re:(?:{regex}){re.escape(OUT_PROJECTION)}" for regex in regexes]


def _target(checkpoint: Checkpoint) -> list[str]:
    named = _patterns(checkpoint, "target_modules")
    if isinstance(checkpoint.config.get("target_modules"), list):
        named = _in_layers(checkpoint, named)
    patterns = _attention_whole(named) + _patterns(checkpoint, "target_parameters")
    if not patterns:
        raise WeightError(f"{checkpoint.path / CONFIG}: its configuration names no target_modules")
    return patterns


def _in_layers(checkpoint: Checkpoint, patterns: list[str]) -> list[str]:
    """The patterns of `target_modules` limited to `layers_to_transform`; full names are taken as they are.

    A layer's number is the first numbered part of a name behind two others, or behind a name in `layers_pattern`.
    """
    layers, before = (checkpoint.config.get(key) for key in ("layers_to_transform", "layers_pattern"))
    if layers is None or layers == []:
        return patterns
    numbers = [layers] if isinstance(layers, int) else layers
    if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
        raise WeightError(
            f"{checkpoint.path / CONFIG}: layers_to_transform: expected layer numbers, got {layers!r}"
        )
    number = f"(?:{'|'.join(map(str, numbers))})"
    starts = [before] if isinstance(before, str) and before else before or []
    if not isinstance(starts, list) or not all(isinstance(name, str) for name in starts):
        raise WeightError(f"{checkpoint.path / CONFIG}: layers_pattern: expected names, got {before!r}")
    first = [rf"(?:(?!(?:{name})\.\d+\.)[^.]*\.)*(?:{name})\.{number}\." for name in starts]
    places = "|".join(first) or rf"[^.]*\.[^.]*\.(?:(?!\d+\.)[^.]*\.)*{number}\."
    ends = (pattern.removeprefix("re:(.*\\.)?") for pattern in patterns)
    return [rf"re:(?:{end}|(?={places}).*\.{end})" for end in ends]
