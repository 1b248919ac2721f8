"""Options of a method or a scheme as the keys of an entry."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ModelWrapValidatorHandler,
    Strict,
    StringConstraints,
    ValidationError,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from adaptc.errors import got, unknown
from adaptc.spec.diagnostics import explained, fault, invalid


def option_keys(cls: Any) -> dict[str, Any]:
    """The dataclass fields of a class, with their constraints, as keys; and `method`, which names it."""
    hints = get_type_hints(cls, include_extras=True)
    keys: dict[str, Any] = {
        f.name: (_from_list(hints[f.name]), _option(cls, f)) for f in dataclasses.fields(cls)
    }
    return keys | {"method": (Literal[cls.name], ...)}


def _from_list(hint: Any) -> Any:
    plain = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    return Annotated[hint, Strict(False)] if get_origin(plain) in (tuple, frozenset) else hint


def _option(cls: Any, option: dataclasses.Field[Any]) -> Any:
    default = option.default if option.default_factory is dataclasses.MISSING else option.default_factory()
    spellings = [spelling for spelling, name in cls.aliases.items() if name == option.name]
    return Field(
        ... if default is dataclasses.MISSING else default,
        validation_alias=AliasChoices(option.name, *spellings) if spellings else None,
    )


T = TypeVar("T")
Many = Annotated[tuple[T, ...], Strict(False)]
"""A list in the spec, which has no tuples; a tuple in Python, where a spec is frozen."""
PathText = Annotated[
    str,
    StringConstraints(strip_whitespace=True, min_length=1),
    BeforeValidator(lambda value: os.fspath(value) if isinstance(value, os.PathLike) else value),
]
"""A path as text; a spec given from Python may hold a `Path`."""


class Part(BaseModel):
    """A mapping in a spec."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @classmethod
    def spellings(cls) -> dict[str, str]:
        """Every key it reads -> the field that key fills."""
        found = {name: name for name in cls.model_fields}
        for name, info in cls.model_fields.items():
            if isinstance(info.validation_alias, AliasChoices):
                found |= {str(spelling): name for spelling in info.validation_alias.choices}
        return found

    @model_validator(mode="wrap")
    @classmethod
    def _explain(cls, data: Any, handler: ModelWrapValidatorHandler[Any]) -> Any:
        try:
            return handler(data)
        except ValidationError as error:
            raise explained(error, cls.spellings()) from None


class Spelled(Part):
    """An entry whose keys may be spelled in several ways, which its schema shows."""

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        shown = handler(schema)
        properties = handler.resolve_ref_schema(shown)["properties"]
        for spelling, name in cls.spellings().items():
            properties.setdefault(spelling, properties[name] | {"description": f"another spelling of {name}"})
        return shown


@dataclass(frozen=True)
class OneOf:
    """Annotates a mapping whose `key` says which model it is.

    Unlike pydantic's own tagged union it looks the models up when a spec is read, so that a method registered
    later is known too, and it leaves no tag in an error's place.

    Attributes:
        key: the key that names the model.
        models: gives name -> model.
        otherwise: keys that may stand in place of `key` -> the model they mean.
    """

    key: str
    models: Callable[[], Mapping[str, type[Part]]]
    otherwise: Mapping[str, type[Part]] = field(default_factory=dict)

    def choose(self, value: Any) -> Part:
        """Validate a mapping by the model it names."""
        if isinstance(value, Part):
            return value
        if not isinstance(value, Mapping):
            raise invalid(fault(f"expected a mapping, got {got(value)}"))
        wanted = " or ".join(repr(key) for key in (self.key, *self.otherwise))
        given = [key for key in (self.key, *self.otherwise) if key in value]
        if not given:
            raise invalid(
                fault(f"an entry needs {wanted}; its keys are: {', '.join(map(str, value)) or 'none'}")
            )
        if len(given) > 1:
            raise invalid(fault(f"an entry has {wanted}, not both", loc=(given[-1],), at_key=True))
        if given[0] in self.otherwise:
            return self.otherwise[given[0]].model_validate(value)
        models, name = self.models(), value[self.key]
        if not isinstance(name, str) or name not in models:
            raise invalid(fault(unknown(self.key, name, sorted(models)), loc=(self.key,)))
        return models[name].model_validate(value)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.choose)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        named = {name: model.__pydantic_core_schema__ for name, model in sorted(self.models().items())}
        others = [model.__pydantic_core_schema__ for model in self.otherwise.values()]
        tagged = core_schema.tagged_union_schema(named, discriminator=self.key)
        return handler(core_schema.union_schema([tagged, *others]) if others else tagged)
