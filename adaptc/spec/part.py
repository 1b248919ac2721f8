"""What the entries of a spec are made of: strict mappings, the options of a class as keys, one model out of several."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

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
from adaptc.spec.yaml_text import is_mapping


def option_names(cls: Any) -> list[str]:
    """The names of the options of a registered dataclass."""
    return [option.name for option in dataclasses.fields(cls)]


def option_keys(cls: Any) -> dict[str, Any]:
    """The fields of a registered dataclass as the keys of its entry.

    Returns:
        Field definitions for `pydantic.create_model`: each option's type and default by its name, and `method`, whose
        only value is the class's name.
    """
    hints = get_type_hints(cls, include_extras=True)
    keys: dict[str, Any] = {
        f.name: (_from_list(hints[f.name]), _option(cls, f)) for f in dataclasses.fields(cls)
    }
    return keys | {"method": (Literal[cls.name], ...)}


def _from_list(hint: object) -> Any:
    plain = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    return Annotated[hint, Strict(False)] if get_origin(plain) in (tuple, frozenset) else hint


def _option(cls: Any, option: dataclasses.Field[Any]) -> Any:
    default = option.default if option.default_factory is dataclasses.MISSING else option.default_factory()
    spellings = [spelling for spelling, name in cls.aliases.items() if name == option.name]
    return Field(
        ... if default is dataclasses.MISSING else default,
        validation_alias=AliasChoices(option.name, *spellings) if spellings else None,
    )


def _path_text(value: object) -> object:
    return os.fspath(cast("os.PathLike[str]", value)) if isinstance(value, os.PathLike) else value


T = TypeVar("T")
Many = Annotated[tuple[T, ...], Strict(False)]
"""A list in YAML, a tuple in Python, where a spec cannot be changed."""
PathText = Annotated[
    str,
    StringConstraints(strip_whitespace=True, min_length=1),
    BeforeValidator(_path_text),
]
"""A path as text. A spec given from Python may hold a `Path`."""


class Part(BaseModel):
    """A mapping in a spec: unknown keys are errors, and values are not converted to another type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @classmethod
    def spellings(cls) -> dict[str, str]:
        """Every key it reads -> the field that key fills."""
        fields = {name: name for name in cls.model_fields}
        for name, info in cls.model_fields.items():
            if isinstance(info.validation_alias, AliasChoices):
                fields |= {str(spelling): name for spelling in info.validation_alias.choices}
        return fields

    @model_validator(mode="wrap")
    @classmethod
    def _explain(cls, data: Any, handler: ModelWrapValidatorHandler[Any]) -> Any:
        try:
            return handler(data)
        except ValidationError as error:
            raise explained(error, cls.spellings()) from None


class Spelled(Part):
    """An entry whose keys have several spellings; its JSON Schema lists them all."""

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        described = handler(schema)
        properties = handler.resolve_ref_schema(described)["properties"]
        for spelling, name in cls.spellings().items():
            properties.setdefault(spelling, properties[name] | {"description": f"another spelling of {name}"})
        return described


@dataclass(frozen=True)
class OneOf:
    """Annotates a mapping that one of several models validates; `key` names the model.

    Unlike pydantic's own tagged union it looks the models up when a spec is read, so that it finds a method which
    registered late, and it adds no tag to an error's location.

    Attributes:
        key: the key whose value names the model.
        models: returns the models by name.
        otherwise: keys that may be given in place of `key` -> the model each chooses.
    """

    key: str
    models: Callable[[], Mapping[str, type[Part]]]
    otherwise: Mapping[str, type[Part]] = field(default_factory=dict[str, type[Part]])

    def choose(self, value: object) -> Part:
        """Validate a mapping by the model it names.

        Raises:
            ValidationError: it is no mapping, names no model, or its model finds it wrong.
        """
        if isinstance(value, Part):
            return value
        if not is_mapping(value):
            raise invalid(fault(f"expected a mapping, got {got(value)}"))
        *others, last = [repr(key) for key in (self.key, *self.otherwise)]
        expected = f"{', '.join(others)} or {last}" if others else last
        given = [key for key in (self.key, *self.otherwise) if key in value]
        if not given:
            raise invalid(
                fault(f"an entry needs {expected}; its keys are: {', '.join(map(str, value)) or 'none'}")
            )
        if len(given) > 1:
            raise invalid(fault(f"an entry has {expected}, only one of them", loc=(given[-1],), at_key=True))
        if given[0] in self.otherwise:
            return self.otherwise[given[0]].model_validate(value)
        models, name = self.models(), value[self.key]
        if not isinstance(name, str) or name not in models:
            raise invalid(fault(unknown(self.key, name, sorted(models)), loc=(self.key,)))
        return models[name].model_validate(value)

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.choose)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        named = {name: model.__pydantic_core_schema__ for name, model in sorted(self.models().items())}
        others = [model.__pydantic_core_schema__ for model in self.otherwise.values()]
        tagged = core_schema.tagged_union_schema(named, discriminator=self.key)
        return handler(core_schema.union_schema([tagged, *others]) if others else tagged)
