"""`adapter_config.json`: read with its types checked, and errors that point into it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Never, cast

from pydantic import BaseModel, ConfigDict, ValidationError, ValidatorFunctionWrapHandler, WrapValidator

from adaptc.errors import Problem, SpecError, WeightError
from adaptc.spec.diagnostics import explained, fault, invalid
from adaptc.spec.source import Source
from adaptc.spec.yaml_text import Loc, YamlText

CONFIG = "adapter_config.json"


def _expected(what: str) -> WrapValidator:
    """One message for a value that is of none of several types."""

    def check(value: object, handler: ValidatorFunctionWrapHandler) -> object:
        try:
            return handler(value)
        except ValidationError:
            raise invalid(fault(f"expected {what}, got {json.dumps(value)}")) from None

    return WrapValidator(check)


Names = Annotated[str | list[str] | None, _expected("text or a list of names")]
NameList = Annotated[list[str] | None, _expected("a list of names")]
Numbers = Annotated[int | list[int] | None, _expected("layer numbers: one, or a list of them")]


class CommonKeys(BaseModel):
    """The keys that several methods' configurations share: where an adapter sits, and where it comes from."""

    model_config = ConfigDict(strict=True, extra="ignore")

    peft_type: str | None = None
    peft_version: str | None = None
    task_type: str | None = None
    auto_mapping: dict[str, Any] | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool | None = None
    target_modules: Names = None
    exclude_modules: Names = None
    modules_to_save: NameList = None
    layers_to_transform: Numbers = None
    layers_pattern: Names = None
    target_parameters: NameList = None
    fan_in_fan_out: bool | None = None
    ensure_weight_tying: bool | None = None
    num_layers: int | None = None
    num_attention_heads: int | None = None
    token_dim: int | None = None


def read_config(path: Path) -> dict[str, Any]:
    """Read the configuration of an adapter.

    Raises:
        WeightError: it cannot be read, is no JSON object, or one of `CommonKeys` has a value of another type.
    """
    config = read_json(path)
    try:
        CommonKeys.model_validate(config)
    except ValidationError as error:
        raise invalid_values(path, error) from None
    return config


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        WeightError: it cannot be read, is not JSON, or no object.
    """
    try:
        data: object = json.loads(
            path.read_text(encoding="utf-8"), parse_constant=_not_a_number, parse_float=_finite
        )
    except OSError as error:
        raise WeightError(f"{path}: cannot be read: {(error.strerror or str(error)).lower()}") from None
    except RecursionError:
        raise WeightError(f"{path}: not JSON (nested too deeply)") from None
    except ValueError as error:  # not JSON, not UTF-8, or a number of thousands of digits
        raise WeightError(f"{path}: not JSON ({error})") from None
    if not isinstance(data, dict):
        raise WeightError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return cast(dict[str, Any], data)


def config_error(path: Path, loc: Loc, message: str, *notes: str, at_key: bool = False) -> WeightError:
    """An error at a place of a configuration.

    Args:
        path: the file.
        loc: the way to the value, such as `("rank_pattern", "q_proj")`.
        message: what is wrong, in one line.
        notes: what was expected, what to do: a line each.
        at_key: point at the key there, not at its value.
    """
    return _error([_placed(_source(path), path, loc, message, notes, at_key)])


def invalid_values(
    path: Path, error: ValidationError, place: Callable[[Loc], Loc] = lambda loc: loc
) -> WeightError:
    """The faults that pydantic found in a configuration, each at its place.

    Args:
        path: the file.
        error: what pydantic raised.
        place: the place in the file of a place that pydantic names.
    """
    source = _source(path)
    faults = explained(error, {}).errors(include_url=False)
    return _error(
        [
            _placed(source, path, place(details["loc"]), details["msg"], details.get("ctx", {})["notes"])
            for details in faults
        ]
    )


def _error(problems: list[Problem]) -> WeightError:
    """Problems as one error: the first, and a line for each other."""
    first, *others = problems
    lines = [str(replace(problem, text="", notes=())) for problem in (first, *others)]
    return WeightError(lines[0], *first.notes, *lines[1:])


def _placed(
    source: Source, path: Path, loc: Loc, message: str, notes: tuple[str, ...], at_key: bool = False
) -> Problem:
    return replace(source.problem(loc, message, *notes, at_key=at_key), file=str(path))


def _source(path: Path) -> Source:
    """A JSON file with the places of its values, which YAML's reader knows: JSON is YAML, but for tabs."""
    text = YamlText(str(path), path.read_text(encoding="utf-8").replace("\t", " "), most=None)
    try:
        data = text.read()
    except SpecError:  # a key that is given twice has no one place
        return Source(path, read_json(path))
    return Source(path, data, text)


def _not_a_number(text: str) -> Never:
    raise ValueError(f"it has no number {text}")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is larger than any number")
    return number
