"""The entries of `adapt`, a method with its options or a trained adapter, and of `quantize`, a scheme with its own."""

from __future__ import annotations

import re
from functools import cache
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field, create_model, model_validator
from pydantic_core import InitErrorDetails

from adaptc.errors import got
from adaptc.methods.method import METHODS, Method, Rank, summary
from adaptc.quantization.scheme import SCHEMES, Scheme
from adaptc.spec.diagnostics import fault, invalid
from adaptc.spec.part import Many, OneOf, Part, PathText, Spelled, option_keys, option_names
from adaptc.spec.targets import Patterns, Target
from adaptc.spec.yaml_text import is_list, is_mapping

Alias = Annotated[
    Literal["refuse", "untie", "live", "share"],
    Field(
        description="where a layer's tensor is used elsewhere too, as tied embeddings are: refuse to fold into it, "
        "untie it, keep its adapter live when the rest is folded, or share the change with the others"
    ),
]
NAME = r"^[A-Za-z0-9_-]+$"
AdapterName = Annotated[str, Field(pattern=NAME, description="the adapter's name")]


class MethodEntry(Spelled):
    """An adaptation to insert. Each method has a subclass that adds the method's options as fields."""

    method: str
    name: AdapterName = "default"
    target: Target = Field(description="globs or re: regexes on module names, all-linear, or a mapping")
    exclude: Patterns = Field((), description="patterns of modules to leave out")
    on_alias: Alias = "refuse"

    def options(self) -> dict[str, Any]:
        """The method's own options, by name."""
        return {name: getattr(self, name) for name in option_names(METHODS[self.method])}

    def build(self) -> Method[Any]:
        """The method with the options of this entry."""
        return METHODS[self.method](**self.options())


class AdapterEntry(Part):
    """A trained adapter: its method, targets, options and weights come from its files."""

    adapter: PathText = Field(description="a checkpoint's directory")
    name: AdapterName | None = None
    on_alias: Alias = "refuse"
    allow_pickle: bool = Field(False, description="read pickled weights, which can run code")
    ignore: Many[str] = Field(
        (), description="options of its configuration to read it without: those that adaptc does not know"
    )
    r: Rank | None = Field(None, description="the rank to cut it to, where its ranks are nested")


class WeightedAdapter(Part):
    """One adapter of a combination."""

    adapter: PathText = Field(description="a checkpoint's directory")
    weight: float = Field(1.0, description="what it is multiplied by; less than zero takes its effect away")
    allow_pickle: bool = Field(False, description="read pickled weights, which can run code")
    ignore: Many[str] = Field((), description="options of its configuration to read it without")

    @property
    def entry(self) -> AdapterEntry:
        """The entry that reads it alone."""
        return AdapterEntry(adapter=self.adapter, allow_pickle=self.allow_pickle, ignore=self.ignore, r=None)


How = Literal[
    "svd",
    "linear",
    "cat",
    "ties",
    "dare_linear",
    "dare_ties",
    "magnitude_prune",
    "ties_svd",
    "dare_linear_svd",
    "dare_ties_svd",
    "magnitude_prune_svd",
]
"""PEFT's `combination_type`s."""


class CombineEntry(Part):
    """Trained adapters as one: PEFT's `add_weighted_adapter`, of any methods that change weights."""

    combine: Annotated[Many[WeightedAdapter], Field(min_length=1)] = Field(description="the adapters")
    how: How = Field(
        "svd",
        description="how they become one: of the factors of LoRA (linear, cat, ties, ...), or of the changes of "
        "weights of any method, approximated at a rank (svd, ties_svd, ...)",
    )
    svd_rank: Rank | None = Field(None, description="with svd: the rank; the largest of theirs if left out")
    density: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="with ties, dare_... and magnitude_prune: the share of numbers that are kept"
    )
    majority_sign_method: Literal["total", "frequency"] = Field(
        "total",
        description="with ties and dare_ties: the sign of the sum, or the one that more adapters have",
    )
    to: str | None = Field(None, description="the method of the result; the first that can hold any change")
    name: AdapterName | None = None
    on_alias: Alias = "refuse"

    @model_validator(mode="after")
    def _fitting(self) -> CombineEntry:
        prunes = self.how not in ("svd", "linear", "cat")
        if prunes and self.density is None:
            raise invalid(fault(f"{self.how} prunes: it needs density, such as density: 0.5", loc=("how",)))
        if not prunes and self.density is not None:
            raise invalid(fault(f"{self.how} prunes nothing: leave density out", loc=("density",)))
        if self.svd_rank is not None and not self.how.endswith("svd"):
            message = f"{self.how} has the ranks of its adapters: leave svd_rank out, or write an svd"
            raise invalid(fault(message, loc=("svd_rank",)))
        return self


@cache
def entry_model(cls: type[Method[Any]]) -> type[MethodEntry]:
    """The model of a method's entries. The fields of the method's dataclass are its keys, with their constraints."""
    keys = option_keys(cls)
    if cls.everywhere:
        keys["target"] = Target, Field(("*",), description="as for every method; every site if left out")
    return create_model(
        f"{cls.__name__}Entry", __base__=MethodEntry, __module__=cls.__module__, __doc__=summary(cls), **keys
    )


def _method_models() -> dict[str, type[MethodEntry]]:
    return {name: entry_model(cls) for name, cls in METHODS.items()}


AdaptEntry: TypeAlias = Annotated[
    MethodEntry | AdapterEntry | CombineEntry,
    OneOf("method", _method_models, {"adapter": AdapterEntry, "combine": CombineEntry}),
]


def _alternatives(value: object) -> object:
    """The names of alternatives are checked before their entries, so that each fault is at its own key."""
    if not is_mapping(value):
        raise invalid(fault(f"expected a mapping of names to lists of entries, got {got(value)}"))
    faults: list[InitErrorDetails] = []
    for name, entries in value.items():
        if not re.fullmatch(NAME, str(name)):
            message = f"the name of an adapter has letters, digits, - and _, got {name!r}"
            faults.append(fault(message, loc=(name,), at_key=True))
        elif is_list(entries) and not entries:
            message = "must not be empty: no adapter at all is the base, which is always there"
            faults.append(fault(message, loc=(name,)))
    if faults:
        raise invalid(*faults)
    return value


Alternatives = Annotated[dict[str, Many[AdaptEntry]], BeforeValidator(_alternatives)]
"""Adapters of which one at a time is active, by name: each a list of entries as under `adapt`."""


class QuantizeEntry(Spelled):
    """Weights to store in few bits. Each scheme has a subclass that adds the scheme's options as fields."""

    method: str
    target: Target = Field(description="as in `adapt`: globs or re: regexes, all-linear, or a mapping")
    exclude: Patterns = Field((), description="patterns of modules to leave out")

    def options(self) -> dict[str, Any]:
        """The scheme's own options, by name."""
        return {name: getattr(self, name) for name in option_names(SCHEMES[self.method])}

    def build(self) -> Scheme:
        """The scheme with the options of this entry."""
        return SCHEMES[self.method](**self.options())


@cache
def _scheme_model(cls: type[Scheme]) -> type[QuantizeEntry]:
    return create_model(
        f"{cls.__name__}Quantization",
        __base__=QuantizeEntry,
        __module__=cls.__module__,
        __doc__=summary(cls),
        **option_keys(cls),
    )


def _scheme_models() -> dict[str, type[QuantizeEntry]]:
    return {name: _scheme_model(cls) for name, cls in SCHEMES.items()}


QuantizeEntries: TypeAlias = Annotated[QuantizeEntry, OneOf("method", _scheme_models)]
