"""Calls of a method's or scheme's own functions: errors name the author's line, and arguments cannot be changed."""

# pyright: reportPrivateUsage=false
# torch offers dispatch modes and the identity of a storage under private names only.

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from adaptc.errors import AdaptcError, DefinitionError
from adaptc.registry.author import place_in

ON_VALUES = r"data-dependent|DataDependent|guard on"
"""A regex on what torch's errors say where code depends on the values of a tensor."""


class _WriteError(Exception):
    """An operation wrote to a tensor that was given as an argument."""


class _RandomError(Exception):
    """An operation drew random numbers."""


class _ReadOnly(TorchDispatchMode):
    """A dispatch mode that refuses operations which draw random numbers, or write to some tensors or views of them.

    Args:
        tensors: the name of each in messages -> the tensor.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        super().__init__()  # pyright: ignore[reportUnknownMemberType] (torch leaves it untyped)
        self.names = {_storage(tensor): name for name, tensor in tensors.items()}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        operation = func._schema.name.partition("::")[2]
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise _RandomError(operation)
        if func._schema.is_mutable:
            given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | dict(
                kwargs or {}
            )
            for argument in func._schema.arguments:
                value = given.get(argument.name)
                written = argument.alias_info is not None and argument.alias_info.is_write
                if written and isinstance(value, torch.Tensor) and _storage(value) in self.names:
                    raise _WriteError(f"{operation} writes into {self.names[_storage(value)]}")
        return func(*args, **(kwargs or {}))


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def read_only(
    function: Callable[..., torch.Tensor],
    operands: Sequence[str],
    given: Sequence[Any],
    theta: Mapping[str, Any],
) -> torch.Tensor:
    """Call `function(*given, **theta)`, and refuse that it writes to its arguments or draws random numbers.

    Args:
        function: what to call.
        operands: the name of each positional argument, for messages.
        given: the positional arguments.
        theta: the keyword arguments.

    Raises:
        _WriteError: it writes to an argument.
        _RandomError: it draws random numbers. `blamed` turns both into a DefinitionError.
    """
    tensors = {**dict(zip(operands, given, strict=True)), **theta}
    with _ReadOnly(tensors):
        return function(*given, **theta)


@contextmanager
def blamed(kind: str, name: str, function: Callable[..., object], hook: str, on: str = "") -> Generator[None]:
    """Turn an error raised by an author's function into one that names the author's line.

    Args:
        kind: the kind of class the author wrote, such as `method`.
        name: the name it is registered under.
        function: the author's function, which the block calls.
        hook: the function's name in messages, such as `weight`.
        on: what it is called for, such as a site; "" for nothing in particular.

    Raises:
        DefinitionError: the block raised an error that is not one of adaptc's.
    """
    try:
        yield
    except AdaptcError:
        raise
    except _WriteError as error:
        raise DefinitionError(
            f"{kind} {name!r}: {hook} changes its arguments in place: {error}",
            place_in(error, function),
            "compute a new tensor, such as W + s in place of W.add_(s)",
        ) from None
    except _RandomError as error:
        raise DefinitionError(
            f"{kind} {name!r}: {hook} draws random numbers: {error}",
            place_in(error, function),
            "it must give the same result each time it is called; random starts are the init of a Param",
        ) from None
    except Exception as error:
        message = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        place = place_in(error, function)
        if re.search(ON_VALUES, message):
            raise DefinitionError(
                f"{kind} {name!r}: {hook} depends on the values of a tensor, which are not known when it is traced",
                place,
                "use torch.where in place of a branch, and tensors in place of numbers taken out of them",
            ) from error
        raise DefinitionError(
            f"{kind} {name!r}: {hook} fails{f' on {on}' if on else ''}: {message}", place
        ) from error
