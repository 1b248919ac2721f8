"""Classes that hold tensors, in a model's inputs and outputs: those that torch does not know are made known to it."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch.utils import _pytree as pytree

from adaptc.errors import TraceError

PLAIN = (
    torch.Tensor,
    torch.SymInt,
    torch.SymFloat,
    torch.SymBool,
    str,
    bytes,
    int,
    float,
    complex,
    bool,
    type(None),
)
"""The classes of values that hold no others."""


def register_containers(value: Any) -> None:
    """Make the dataclasses and subclasses of dict in a value known to torch's pytrees, those inside others too.

    Raises:
        TraceError: a class there holds tensors, and nothing says how it is made of its parts.
    """
    if isinstance(value, PLAIN):
        return
    cls = cast(Any, type)(value)
    if not _is_known(value):
        if dataclasses.is_dataclass(cls):
            _register_dataclass(cls)
        elif issubclass(cls, dict):
            _register(cast(Any, cls), dict, cast(Any, cls), pytree.MappingKey)
        elif _holds_tensors(value):
            raise TraceError(_message(cls), *_advice(cls))
        else:
            return
    children, _ = pytree.SUPPORTED_NODES[_node_type(value)].flatten_fn(value)
    for child in children:
        register_containers(child)


def step_of(key: object) -> Any:
    """The key, index or field that a step of a pytree's path takes."""
    return next((getattr(key, kind) for kind in ("key", "idx", "name") if hasattr(key, kind)), key)


def _node_type(value: object) -> Any:
    return cast(Any, pytree)._get_node_type(value)


def _is_known(value: object) -> bool:
    return _node_type(value) in pytree.SUPPORTED_NODES


def _register_dataclass(cls: Any) -> None:
    """Register a dataclass by its fields. Its constructor is called where that takes every field."""
    fields = [field.name for field in dataclasses.fields(cls)]
    constructs = set(fields) <= set(inspect.signature(cls).parameters)

    def parts(value: object) -> dict[str, Any]:
        return {name: getattr(value, name) for name in fields if getattr(value, name, None) is not None}

    def make(given: dict[str, Any]) -> Any:
        every = dict.fromkeys(fields) | given
        if constructs:
            return cls(**every)
        made = cls.__new__(cls)
        for name, value in every.items():
            object.__setattr__(made, name, value)  # a frozen one too
        return made

    _register(cls, parts, make, pytree.GetAttrKey)


def _register(
    cls: Any, parts: Callable[[Any], dict[Any, Any]], make: Callable[[dict[Any, Any]], Any], step: Any
) -> None:
    """Make a class known to torch.

    Args:
        cls: the class.
        parts: key -> part, of a value.
        make: a value of its parts.
        step: the class of a step to a part.
    """

    def flatten(value: object) -> tuple[list[Any], list[Any]]:
        return list(parts(value).values()), list(parts(value))

    def with_keys(value: Any) -> tuple[list[tuple[Any, Any]], list[Any]]:
        return [(step(key), part) for key, part in parts(value).items()], list(parts(value))

    def unflatten(values: Iterable[Any], keys: Any) -> Any:
        return make(dict(zip(keys, values, strict=True)))

    pytree.register_pytree_node(cls, flatten, unflatten, flatten_with_keys_fn=with_keys)


def _holds_tensors(value: object) -> bool:
    return any(isinstance(part, torch.Tensor) for part in getattr(value, "__dict__", {}).values())


def _full_name(cls: Any) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _message(cls: object) -> str:
    return f"{_full_name(cls)} holds tensors, and torch does not know how it is made of them"


def _advice(cls: Any) -> tuple[str, str]:
    return (
        "expected tensors in lists, tuples, dicts, named tuples or dataclasses",
        f"make {cls.__name__} a dataclass, or call torch.utils._pytree.register_pytree_node({cls.__name__}, ...) first",
    )
