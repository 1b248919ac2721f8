"""The entries of `adapt`: a method with its target and options, or a trained adapter."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, create_model

from adaptc.methods.method import METHODS, Method, Rank, summary
from adaptc.quantization.scheme import SCHEMES, Scheme
from adaptc.spec.part import OneOf, Part, PathText, Spelled, option_keys
from adaptc.spec.targets import Patterns, Target

Alias = Annotated[
    Literal["refuse", "untie", "live", "share"],
    Field(
        description="where a layer's tensor is used elsewhere too, as tied embeddings are: refuse to fold into it, "
        "untie it, keep its adapter live when the rest is folded, or share the change with the others"
    ),
]
AdapterName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$", description="the adapter's name")]


class MethodEntry(Spelled):
    """An adaptation to insert. Each method has a subclass with its own options as fields."""

    method: str
    name: AdapterName = "default"
    target: Target = Field(description="globs or re: regexes on module names, all-linear, or a mapping")
    exclude: Patterns = Field((), description="patterns of modules to leave out")
    on_alias: Alias = "refuse"

    def options(self) -> dict[str, Any]:
        """The method's own options."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(METHODS[self.method])}  # type: ignore[arg-type]

    def build(self) -> Method:
        """The method with these options."""
        return METHODS[self.method](**self.options())


class AdapterEntry(Part):
    """A trained adapter: its method, targets, options and weights come from its files."""

    adapter: PathText = Field(description="a checkpoint's directory")
    name: AdapterName | None = None
    on_alias: Alias = "refuse"
    allow_pickle: bool = Field(False, description="read pickled weights, which can run code")
    r: Rank | None = Field(None, description="the rank to cut it to, where its ranks are nested")


@cache
def entry_model(cls: type[Method]) -> type[MethodEntry]:
    """The model of a method's entries: its dataclass fields, with their constraints, are keys."""
    keys = option_keys(cls)
    if cls.everywhere:
        keys["target"] = Target, Field(("*",), description="as of every method; everywhere if left out")
    return create_model(
        f"{cls.__name__}Entry", __base__=MethodEntry, __module__=cls.__module__, __doc__=summary(cls), **keys
    )


def _entry_models() -> dict[str, type[MethodEntry]]:
    return {name: entry_model(cls) for name, cls in METHODS.items()}


AdaptEntry: TypeAlias = Annotated[
    MethodEntry | AdapterEntry, OneOf("method", _entry_models, {"adapter": AdapterEntry})
]


class QuantizeEntry(Spelled):
    """Weights to store in few bits. Each scheme has a subclass with its own options as fields."""

    method: str
    target: Target = Field(description="as in `adapt`: globs or re: regexes, all-linear, or a mapping")
    exclude: Patterns = Field((), description="patterns of modules to leave out")

    def options(self) -> dict[str, Any]:
        """The scheme's own options."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(SCHEMES[self.method])}

    def build(self) -> Scheme:
        """The scheme with these options."""
        return SCHEMES[self.method](**self.options())


@cache
def _entry_model(cls: type[Scheme]) -> type[QuantizeEntry]:
    return create_model(
        f"{cls.__name__}Quantization",
        __base__=QuantizeEntry,
        __module__=cls.__module__,
        __doc__=summary(cls),
        **option_keys(cls),
    )


def _models() -> dict[str, type[QuantizeEntry]]:
    return {name: _entry_model(cls) for name, cls in SCHEMES.items()}


QuantizeEntries: TypeAlias = Annotated[QuantizeEntry, OneOf("method", _models)]
