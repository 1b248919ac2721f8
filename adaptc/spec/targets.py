"""The entry `target`: which modules, by globs, `re:` regexes, or a mapping of conditions on a layer."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, model_validator

from adaptc.errors import got, unknown
from adaptc.patterns import ROLES, matches, parse_layers
from adaptc.spec.diagnostics import fault, invalid
from adaptc.spec.part import Many, Part
from adaptc.spec.yaml_text import is_mapping


def _pattern(text: str) -> str:
    try:
        re.compile(text[3:] if text.startswith("re:") else "")
    except re.error as error:
        raise ValueError(f"{text!r} is not a regular expression: {error}") from None
    return text


def _layers(text: str) -> str:
    parse_layers(text)
    return text


def _role(text: str) -> str:
    if not any(matches(text, role) for role in ROLES):
        raise ValueError(unknown("role", text, ROLES))
    return text


def _some(values: tuple[str, ...]) -> tuple[str, ...]:
    if not values:
        raise ValueError("must not be empty")
    return values


Pattern = Annotated[str, Field(min_length=1), AfterValidator(_pattern)]
Patterns = Annotated[
    Many[Pattern],
    BeforeValidator(lambda value: (value,) if isinstance(value, str) else value, str | list[str]),
]
Role = Annotated[str, AfterValidator(_role)]
Roles = Annotated[
    Many[Role],
    AfterValidator(_some),
    BeforeValidator(lambda value: (value,) if isinstance(value, str) else value, str | list[str]),
]
Layers = Annotated[
    str,
    AfterValidator(_layers),
    BeforeValidator(lambda value: str(value) if type(value) is int else value, int | str),
]


class LayerTarget(Part):
    """Chooses the layers that meet every condition given."""

    name: Pattern | None = Field(None, description="a glob, or a re: regex, on the module's full name")
    type: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="the module's class, such as Linear"
    )
    layers: Layers | None = Field(None, description="first numbered segment of the name, such as 0-5,11")

    op: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="the operation that reads the weight, such as conv2d"
    )
    role: Roles | None = Field(
        None,
        description="what the layer does, read from the dataflow, such as attention.value; or a list of such",
    )
    node: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="a node of the graph by its name, as `--print-after` shows it"
    )
    input: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="with node: the node of the sub-layer's input, for a method that reads it"
    )

    @model_validator(mode="after")
    def _chooses(self) -> LayerTarget:
        if not self.model_fields_set:
            raise invalid(
                fault(
                    "an empty mapping chooses nothing: give name, type, layers, op, role or node", at_key=True
                )
            )
        return self


_PATTERNS = TypeAdapter[tuple[str, ...]](
    Annotated[Patterns, Field(min_length=1)], config=ConfigDict(strict=True)
)


def _target(value: object) -> tuple[str, ...] | dict[str, Any]:
    if is_mapping(value):
        criteria = LayerTarget.model_validate(value).model_dump(exclude_none=True)
        roles = criteria.get("role", ())
        return criteria | ({"role": roles[0]} if len(roles) == 1 else {})
    if not isinstance(value, str | list | tuple):
        raise invalid(fault(f"expected a pattern, a list of patterns or a mapping, got {got(value)}"))
    return _PATTERNS.validate_python(value)


Target = Annotated[
    tuple[str, ...] | dict[str, Any],
    BeforeValidator(_target, json_schema_input_type=str | list[str] | LayerTarget),
]
"""Patterns, or the keys of a `LayerTarget` as plain data; `ir.selection` finds the sites they name."""
