"""How much a command says: `-v` shows the records of the loggers `adaptc.*`, `-q` nothing but errors.

The level of the logger `adaptc` is the setting, and `is_quiet` reads it: a program that uses adaptc sets it likewise.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Callable
from typing import Annotated, Any, TextIO, TypeVar

import typer

LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)
"""The level for no `-v`, one, and two."""
F = TypeVar("F", bound=Callable[..., Any])
LOGGER = logging.getLogger("adaptc")
Verbose = Annotated[
    int,
    typer.Option(
        "-v",
        "--verbose",
        count=True,
        show_default=False,
        help="log each step and its time; -vv each pass too",
    ),
]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="print errors, and what was asked for, alone")]


class StandardError(logging.StreamHandler[TextIO]):
    """Writes records to standard error as it is when they come: a progress bar puts another in its place."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s", "%H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        self.stream = sys.stderr
        super().emit(record)


def set_verbosity(verbose: int, quiet: bool) -> None:
    """Set what commands say from now on.

    Args:
        verbose: how often `-v` was given.
        quiet: whether `-q` was given, which wins.
    """
    if not any(isinstance(handler, StandardError) for handler in LOGGER.handlers):
        LOGGER.addHandler(StandardError())
    LOGGER.setLevel(logging.ERROR if quiet else LEVELS[min(verbose, len(LEVELS) - 1)])


def is_quiet() -> bool:
    """Whether nothing but errors is to be said."""
    return not LOGGER.isEnabledFor(logging.WARNING)


class CommandLine(typer.Typer):
    """A command line whose every command takes `-v` and `-q`."""

    def command(self, *args: Any, **options: Any) -> Callable[[F], F]:
        """A decorator that makes a function a command."""
        register = super().command(*args, **options)

        def decorate(function: F) -> F:
            register(_with_verbosity(function))
            return function

        return decorate


def _with_verbosity(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that takes `verbose` and `quiet` beside its own parameters, and sets them first."""

    @functools.wraps(function)
    def run(*args: Any, verbose: int, quiet: bool, **options: Any) -> Any:
        if verbose or quiet:  # else as they stand before the command's name
            set_verbosity(verbose, quiet)
        return function(*args, **options)

    signature = inspect.signature(function, eval_str=True)
    kind = inspect.Parameter.KEYWORD_ONLY
    added = [
        inspect.Parameter("verbose", kind, default=0, annotation=Verbose),
        inspect.Parameter("quiet", kind, default=False, annotation=Quiet),
    ]
    parameters = [*signature.parameters.values(), *added]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run
