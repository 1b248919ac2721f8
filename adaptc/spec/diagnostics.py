"""Messages about a wrong spec: pydantic's errors reworded, and located in the file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

from pydantic import ValidationError
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from adaptc.errors import Problem, did_you_mean, got, unknown
from adaptc.spec.source import Source
from adaptc.spec.yaml_text import Loc

_OURS = "adaptc"
"""The type, for pydantic, of the errors that `fault` makes."""
_KEY = "[key]"
"""What pydantic puts behind the place of a key that is wrong itself."""
_NOUNS = {
    "bool": "true or false",
    "dict": "a mapping",
    "float": "a number",
    "int": "a whole number",
    "list": "a list",
    "mapping": "a mapping",
    "model": "a mapping",
    "string": "text",
    "tuple": "a list",
}
_BOUNDS = {
    "greater_than": "greater than",
    "greater_than_equal": "at least",
    "less_than": "less than",
    "less_than_equal": "at most",
}


def fault(message: str, *notes: str, loc: Loc = (), at_key: bool = False) -> InitErrorDetails:
    """An error about the value being validated, or about something below it.

    Args:
        message: what is wrong, in one line.
        notes: what was expected, what to do: a line each.
        loc: the way from the value being validated to what is wrong.
        at_key: point at the key there, not at its value.
    """
    context = {"message": message, "notes": notes, "at_key": at_key}
    return InitErrorDetails(type=PydanticCustomError(_OURS, "{message}", context), loc=loc, input=None)


def invalid(*faults: InitErrorDetails) -> ValidationError:
    """The exception that a validator raises. Pydantic puts the location of the validated value before each fault's."""
    return ValidationError.from_exception_data("spec", list(faults))


def explained(error: ValidationError, spellings: Mapping[str, str]) -> ValidationError:
    """Reword pydantic's messages.

    Args:
        error: raised by a model of the spec.
        spellings: every key that the model reads -> the field that key fills.
    """
    return invalid(*(_explained(details, spellings) for details in error.errors(include_url=False)))


def problems(error: ValidationError, source: Source) -> list[Problem]:
    """The faults of an error that `explained` returned, as problems in the order of the file."""
    located: list[Problem] = []
    for details in error.errors(include_url=False):
        context = details.get("ctx", {})
        loc = _written(details["loc"], source.data)
        located.append(source.problem(loc, details["msg"], *context["notes"], at_key=context["at_key"]))
    return sorted(located, key=lambda problem: (problem.line or 0, problem.column or 0))


def _explained(details: ErrorDetails, spellings: Mapping[str, str]) -> InitErrorDetails:
    kind, loc, value, context = details["type"], details["loc"], details["input"], details.get("ctx", {})
    if kind == _OURS:
        return fault(context["message"], *context["notes"], loc=loc, at_key=context["at_key"])
    if kind == "extra_forbidden":
        return _unknown_key(loc, spellings)
    if kind == "invalid_key":
        return fault(f"a key must be text, got {got(value)}", loc=loc, at_key=True)
    message = _message(kind, value, context, details["msg"])
    if loc[-1:] == (_KEY,):
        return fault(message, loc=loc[:-1], at_key=True)
    return fault(message, loc=loc)


def _unknown_key(loc: Loc, spellings: Mapping[str, str]) -> InitErrorDetails:
    key = loc[-1]
    if key in spellings:
        option = spellings[str(key)]
        return fault(f"another spelling of {option!r}, which is given too: keep one", loc=loc, at_key=True)
    options = dict.fromkeys(spellings.values())
    return fault(unknown("key", key, spellings, listed=options), loc=loc, at_key=True)


def _message(kind: str, value: object, context: Mapping[str, Any], message: str) -> str:
    if kind == "missing":
        return "required, but missing"
    if kind == "value_error":
        return str(context["error"])
    if context.get("min_length") == 1:
        return "must not be empty"
    if kind == "finite_number":
        return f"must be a finite number, got {got(value)}"
    if kind == "string_pattern_mismatch":
        return f"must match {context['pattern'].strip('^$')}, got {got(value)}"
    if kind in _BOUNDS:
        return f"must be {_BOUNDS[kind]} {next(iter(context.values())):g}, got {got(value)}"
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", context["expected"])
        hint = did_you_mean(value, choices) if isinstance(value, str) else ""
        return f"expected {context['expected']}, got {got(value)}{hint}"
    noun = _NOUNS.get(kind.split("_")[0])
    if noun is not None:
        return f"expected {noun}, got {got(value)}"
    return f"{message[:1].lower()}{message[1:]}, got {got(value)}"


def _written(loc: Loc, data: object) -> Loc:
    """The part of a location that exists in the data as written, and the key that is missing after it, if one is."""
    for depth, part in enumerate(loc):
        if not isinstance(data, Mapping | list | tuple):
            return loc[:depth]
        try:
            data = cast("Any", data)[part]
        except (LookupError, TypeError):
            return loc[: depth + 1]
    return loc
