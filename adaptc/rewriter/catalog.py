"""Every pass by name: the registered ones, `insert-` for every method, `quantize-` for every scheme."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, TypeAlias, get_type_hints

from pydantic import TypeAdapter, create_model

from adaptc.errors import nearest
from adaptc.methods.method import METHODS, Method
from adaptc.quantization.scheme import SCHEMES, Scheme
from adaptc.rewriter.insert.activation import InsertActivation
from adaptc.rewriter.insert.attention import InsertAttention
from adaptc.rewriter.insert.base import Insert
from adaptc.rewriter.insert.input import InsertInput
from adaptc.rewriter.insert.weight import InsertWeight
from adaptc.rewriter.pipeline import PASSES, Pass
from adaptc.rewriter.quantize import Quantize

Body: TypeAlias = Method[Any] | Scheme
ENGINES: tuple[type[Insert[Any]], ...] = (InsertWeight, InsertActivation, InsertAttention, InsertInput)
"""How each kind of method is inserted; `Insert(method, ...)` makes the one for the method's kind."""


class PassFactory:
    """Makes passes that insert a method, or quantize by a scheme: `InsertLora(target="*.query", r=4)`.

    It takes the options of the pass, such as `target`, and those of the method or the scheme, as its signature says.

    Attributes:
        name: what a spec calls the pass, such as `insert-lora`.
        pass_class: `Insert` or `Quantize`.
        body: the method or the scheme.
        takes: the stages it can start from.
        leaves: the stage it leaves; None where it does not change it.
        changes_results: whether the graph it leaves may compute something else.
    """

    def __init__(self, pass_class: Any, body: type[Body], name: str):
        self.pass_class, self.body, self.name = pass_class, body, name
        self.takes, self.leaves = pass_class.takes, pass_class.leaves
        self.changes_results: bool = pass_class.changes_results
        self.__name__ = "".join(part.capitalize() for part in name.split("-"))
        self.__qualname__, self.__module__, self.__doc__ = self.__name__, body.__module__, body.__doc__

    def __call__(self, *args: Any, **options: Any) -> Pass:
        """The pass with these options.

        Raises:
            TypeError: an option is unknown, or one that has no default is missing.
        """
        given = inspect.signature(self).parameters
        unknown = next((option for option in options if option not in given), None)
        if unknown is not None:
            near = nearest(unknown, given, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(
                f"{self.__name__}: unknown option {unknown!r}{hint}\n  its options: {', '.join(given)}"
            )
        bound = inspect.signature(self).bind(*args, **options).arguments
        own = {name: value for name, value in bound.items() if name in self._options(self.body)}
        common = {name: value for name, value in bound.items() if name not in own}
        return self.pass_class(self.body(**own), **common)

    def validated(self, options: Mapping[str, Any]) -> Pass:
        """The pass with options as a spec holds them.

        Raises:
            pydantic.ValidationError: one is of another type, or out of its bounds.
        """
        own = {name: value for name, value in options.items() if name in self._options(self.body)}
        body = TypeAdapter(self.body).validate_python(own)
        common = {name: value for name, value in options.items() if name not in own}
        hints = get_type_hints(self.pass_class)
        fields: dict[str, Any] = {name: (hints[name], ...) for name in common}
        checked = create_model(self.__name__, **fields)(**common)
        return self.pass_class(body, **{name: getattr(checked, name) for name in common})

    @property
    def __signature__(self) -> inspect.Signature:
        parameters = []
        for cls in (self.pass_class, self.body):
            for name, option in self._options(cls).items():
                default = inspect.Parameter.empty
                if option.default is not dataclasses.MISSING:
                    default = option.default
                elif option.default_factory is not dataclasses.MISSING:
                    default = option.default_factory()
                positional = name == "target"
                kind = (
                    inspect.Parameter.POSITIONAL_OR_KEYWORD if positional else inspect.Parameter.KEYWORD_ONLY
                )
                parameters.append(inspect.Parameter(name, kind, default=default, annotation=option.type))
        return inspect.Signature(parameters, return_annotation=self.pass_class)

    def _options(self, cls: type[Any]) -> dict[str, dataclasses.Field[Any]]:
        return {f.name: f for f in dataclasses.fields(cls) if f.name not in ("method", "scheme")}


AnyPass: TypeAlias = type[Pass] | PassFactory


def load_passes() -> dict[str, AnyPass]:
    """Every pass by the name a spec calls it by, as registered now."""
    inserts = {f"insert-{name}": PassFactory(Insert, cls, f"insert-{name}") for name, cls in METHODS.items()}
    quantizes = {
        f"quantize-{name}": PassFactory(Quantize, cls, f"quantize-{name}") for name, cls in SCHEMES.items()
    }
    return {**PASSES, **inserts, **quantizes}
