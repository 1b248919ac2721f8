"""Options of a method or a scheme as the keys of an entry."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from pydantic import AliasChoices, Field, GetJsonSchemaHandler, Strict
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from adaptc.spec_part import Part


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
