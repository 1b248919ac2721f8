"""Every pass by name: the registered ones, `insert-` for every method, `quantize-` for every scheme."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, TypeAlias, get_type_hints

from pydantic import TypeAdapter, create_model

from adaptc.errors import unknown, with_notes
from adaptc.methods.method import METHODS, Method
from adaptc.quantization.scheme import SCHEMES, Scheme
from adaptc.rewriter.insert.activation import InsertActivation
from adaptc.rewriter.insert.attention import InsertAttention
from adaptc.rewriter.insert.base import Insert
from adaptc.rewriter.insert.head import InsertHead
from adaptc.rewriter.insert.input import InsertInput
from adaptc.rewriter.insert.weight import InsertWeight
from adaptc.rewriter.pipeline import PASSES, Pass
from adaptc.rewriter.quantize import Quantize

Body: TypeAlias = Method[Any] | Scheme
"""What such a pass inserts, or quantizes by."""
ENGINES: tuple[type[Insert[Any, Any]], ...] = (
    InsertWeight,
    InsertActivation,
    InsertAttention,
    InsertInput,
    InsertHead,
)
"""The engine for each kind of method. Importing them enters them, so that `Insert(method, ...)` finds the right one."""


class PassFactory:
    """Makes the passes that insert one method, or quantize by one scheme: `InsertLora(target="*.query", r=4)`.

    It is called with the options of the pass, such as `target`, and those of the method or scheme: its signature has
    both.

    Attributes:
        name: what a spec calls the pass, such as `insert-lora`.
        pass_class: `Insert` or `Quantize`.
        body: the class of the method or scheme.
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
        name = next((option for option in options if option not in given), None)
        if name is not None:
            message = f"{self.__name__}: {unknown('option', name, given, listed=())}"
            raise TypeError(with_notes(message, [f"its options: {', '.join(given)}"]))
        bound = inspect.signature(self).bind(*args, **options).arguments
        body_options, pass_options = self._divided(bound)
        return self.pass_class(self.body(**body_options), **pass_options)

    def validated(self, options: Mapping[str, Any]) -> Pass:
        """The pass with options as a spec states them.

        Raises:
            pydantic.ValidationError: one is of another type, or out of its bounds.
        """
        body_options, pass_options = self._divided(options)
        body = TypeAdapter(self.body).validate_python(body_options)
        hints = get_type_hints(self.pass_class)
        fields: dict[str, Any] = {name: (hints[name], ...) for name in pass_options}
        checked = create_model(self.__name__, **fields)(**pass_options)
        return self.pass_class(body, **{name: getattr(checked, name) for name in pass_options})

    def _divided(self, options: Mapping[str, object]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Options of the method or scheme, and options of the pass."""
        of_body = self._options(self.body)
        return (
            {name: value for name, value in options.items() if name in of_body},
            {name: value for name, value in options.items() if name not in of_body},
        )

    @property
    def __signature__(self) -> inspect.Signature:
        parameters: list[inspect.Parameter] = []
        for cls in (self.pass_class, self.body):
            for name, option in self._options(cls).items():
                default = inspect.Parameter.empty
                if option.default is not dataclasses.MISSING:
                    default = option.default
                elif option.default_factory is not dataclasses.MISSING:
                    default = option.default_factory()
                kinds = inspect.Parameter
                kind = kinds.POSITIONAL_OR_KEYWORD if name == "target" else kinds.KEYWORD_ONLY
                parameters.append(inspect.Parameter(name, kind, default=default, annotation=option.type))
        return inspect.Signature(parameters, return_annotation=self.pass_class)

    def _options(self, cls: type[Any]) -> dict[str, dataclasses.Field[Any]]:
        """The fields of a class that are options: all but the method or scheme itself."""
        return {f.name: f for f in dataclasses.fields(cls) if f.name not in ("method", "scheme")}


AnyPass: TypeAlias = type[Pass] | PassFactory
"""What makes a pass from its options."""


def load_passes() -> dict[str, AnyPass]:
    """Every pass by the name a spec calls it by, as registered now."""
    inserts = {f"insert-{name}": PassFactory(Insert, cls, f"insert-{name}") for name, cls in METHODS.items()}
    quantizes = {
        f"quantize-{name}": PassFactory(Quantize, cls, f"quantize-{name}") for name, cls in SCHEMES.items()
    }
    return {**PASSES, **inserts, **quantizes}
