"""The entries of `quantize`: a scheme with its target and options."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Annotated, Any, TypeAlias

from pydantic import Field, create_model

from adaptc.method_contract import summary
from adaptc.option_keys import Spelled, option_keys
from adaptc.scheme_contract import SCHEMES, Scheme
from adaptc.spec_part import OneOf
from adaptc.targets import Patterns, Target


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
