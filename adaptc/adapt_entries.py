"""The entries of `adapt`: a method with its target and options, or a trained adapter."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Annotated, Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

from pydantic import AliasChoices, Field, GetJsonSchemaHandler, Strict, create_model
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from adaptc.method import Method, Rank, summary
from adaptc.registry import load_methods, method_named
from adaptc.spec_part import OneOf, Part, PathText
from adaptc.targets import Patterns, Target

Alias = Annotated[
    Literal["refuse", "untie", "live", "share"],
    Field(
        description="where a layer's tensor is used elsewhere too, as tied embeddings are: refuse to fold into it, "
        "untie it, keep its adapter live when the rest is folded, or share the change with the others"
    ),
]
AdapterName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$", description="the adapter's name")]


class MethodEntry(Part):
    """An adaptation to insert. Each method has a subclass with its own options as fields."""

    method: str
    name: AdapterName = "default"
    target: Target = Field(description="globs or re: regexes on module names, all-linear, or a mapping")
    exclude: Patterns = Field((), description="patterns of modules to leave out")
    on_alias: Alias = "refuse"

    def options(self) -> dict[str, Any]:
        """The method's own options."""
        return {f.name: getattr(self, f.name) for f in _fields(method_named(self.method))}

    def build(self) -> Method:
        """The method with these options."""
        return method_named(self.method)(**self.options())

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        shown = handler(schema)
        properties = handler.resolve_ref_schema(shown)["properties"]
        for spelling, name in cls.spellings().items():
            properties.setdefault(spelling, properties[name] | {"description": f"another spelling of {name}"})
        return shown


class AdapterEntry(Part):
    """A trained adapter: its method, targets, options and weights come from its files."""

    adapter: PathText = Field(description="a checkpoint's directory")
    name: AdapterName | None = None
    on_alias: Alias = "refuse"
    allow_pickle: bool = Field(False, description="read pickled weights, which can run code")
    r: Rank | None = Field(None, description="the rank to cut it to, where its ranks are nested")


def _fields(cls: type[Method]) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(cls)  # type: ignore[arg-type]


def _from_list(hint: Any) -> Any:
    plain = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    return Annotated[hint, Strict(False)] if get_origin(plain) in (tuple, frozenset) else hint


def _option(cls: type[Method], option: dataclasses.Field[Any]) -> Any:
    default = option.default if option.default_factory is dataclasses.MISSING else option.default_factory()
    spellings = [spelling for spelling, name in cls.aliases.items() if name == option.name]
    return Field(
        ... if default is dataclasses.MISSING else default,
        validation_alias=AliasChoices(option.name, *spellings) if spellings else None,
    )


@cache
def entry_model(cls: type[Method]) -> type[MethodEntry]:
    """The model of a method's entries: its dataclass fields, with their constraints, are keys."""
    hints = get_type_hints(cls, include_extras=True)
    keys: dict[str, Any] = {f.name: (_from_list(hints[f.name]), _option(cls, f)) for f in _fields(cls)}
    keys["method"] = Literal[cls.name], ...
    if cls.everywhere:
        keys["target"] = Target, Field(("*",), description="as of every method; everywhere if left out")
    return create_model(
        f"{cls.__name__}Entry", __base__=MethodEntry, __module__=cls.__module__, __doc__=summary(cls), **keys
    )


def _entry_models() -> dict[str, type[MethodEntry]]:
    return {name: entry_model(cls) for name, cls in load_methods().items()}


AdaptEntry: TypeAlias = Annotated[
    MethodEntry | AdapterEntry, OneOf("method", _entry_models, {"adapter": AdapterEntry})
]
