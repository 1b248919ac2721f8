"""Calls of what an author wrote: errors name the line, and nothing that was handed in is written to."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from adaptc.errors import AdaptcError, DefinitionError
from adaptc.registry.author import place_in

ON_VALUES = re.compile(r"data-dependent|DataDependent|guard on")
"""How torch says that something depends on the values of a tensor."""


class _WriteError(Exception):
    """An operation wrote to a tensor that was handed in."""


class _ReadOnly(TorchDispatchMode):
    """Refuses operations that write to some tensors, or to views of them.

    Args:
        tensors: what each is called -> the tensor.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        super().__init__()
        self.names = {_storage(tensor): name for name, tensor in tensors.items()}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func._schema.is_mutable:
            given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | dict(
                kwargs or {}
            )
            for argument in func._schema.arguments:
                value = given.get(argument.name)
                written = argument.alias_info is not None and argument.alias_info.is_write
                if written and isinstance(value, torch.Tensor) and _storage(value) in self.names:
                    operation = func._schema.name.partition("::")[2]
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
    """`function(*given, **theta)`, none of which it may write to; `operands` are the names of what is given.

    Raises:
        Exception: it writes to one of them; `blamed` turns this into a DefinitionError.
    """
    tensors = {**dict(zip(operands, given, strict=True)), **theta}
    with _ReadOnly(tensors):
        return function(*given, **theta)


@contextmanager
def blamed(kind: str, name: str, function: Callable[..., Any], what: str, on: str = "") -> Iterator[None]:
    """Turn an error of an author's function into one that names the author's line.

    Args:
        kind: what the author wrote, such as `method`.
        name: what it is registered as.
        function: the author's function that is called.
        what: what the function is called in messages, such as `weight`.
        on: what it was called for, such as a site; "" for nothing in particular.

    Raises:
        DefinitionError: an error that is none of adaptc's own came out.
    """
    try:
        yield
    except AdaptcError:
        raise
    except _WriteError as error:
        raise DefinitionError(
            f"{kind} {name!r}: {what} changes its arguments in place: {error}",
            place_in(error, function),
            "compute a new tensor, such as W + s in place of W.add_(s)",
        ) from None
    except Exception as error:
        words = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        where = place_in(error, function)
        if ON_VALUES.search(words):
            raise DefinitionError(
                f"{kind} {name!r}: {what} depends on the values of a tensor, which are not known when it is traced",
                where,
                "use torch.where in place of a branch, and tensors in place of numbers taken out of them",
            ) from error
        raise DefinitionError(
            f"{kind} {name!r}: {what} fails{f' on {on}' if on else ''}: {words}", where
        ) from error
