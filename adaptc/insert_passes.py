"""The pass that inserts a method: one for every method, by its kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from adaptc.insert import Insert
from adaptc.insert_activation import InsertActivation
from adaptc.insert_attention import InsertAttention
from adaptc.insert_input import InsertInput
from adaptc.insert_weight import InsertWeight
from adaptc.kinds import ActivationMethod, AttentionMethod, InputMethod
from adaptc.method import Method, WeightMethod

BASES: Mapping[type[Method], type[Insert]] = {
    WeightMethod: InsertWeight,
    ActivationMethod: InsertActivation,
    AttentionMethod: InsertAttention,
    InputMethod: InsertInput,
}
"""The kinds of method -> how one is inserted."""


def insert_pass(cls: type[Method]) -> type[Insert]:
    """The pass that inserts a method: `InsertLora`, called `insert-lora` in a spec."""
    fields: list[Any] = []
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        factory = f.default_factory
        fields.append(
            (
                f.name,
                Any,
                dataclasses.field(default_factory=factory)
                if factory is not dataclasses.MISSING
                else dataclasses.field(default=f.default),
            )
        )
    name = "Insert" + "".join(part.capitalize() for part in cls.name.split("-"))
    base = next(insert for kind, insert in BASES.items() if issubclass(cls, kind))
    made = dataclasses.make_dataclass(name, fields, bases=(base,), frozen=True)
    made.method_class, made.name, made.__doc__, made.__module__ = (
        cls,
        f"insert-{cls.name}",
        cls.__doc__,
        cls.__module__,
    )
    return made
