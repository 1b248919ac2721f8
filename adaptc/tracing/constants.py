"""Inputs that are the same in every call: what a model reads of them in Python is known while it is traced."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import MethodType
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses import fake_tensor

from adaptc.errors import InputError
from adaptc.inputs import InputSpec
from adaptc.ir.base import Base

LARGEST = 1 << 20
"""How many values of a constant, and of what is computed of it, are known at most."""


def constant_tensors(constants: Sequence[InputSpec]) -> dict[str, torch.Tensor]:
    """The tensors of constants by name."""
    return {spec.name: torch.tensor(spec.constant, dtype=getattr(torch, spec.dtype)) for spec in constants}


def with_constants(model: nn.Module, constants: Sequence[InputSpec]) -> nn.Module:
    """A module with the same parts, whose forward takes all but these inputs; the model itself is not changed.

    Raises:
        InputError: forward takes no such input.
    """
    if not constants:
        return model
    original: Any = model.forward
    parameters = inspect.signature(original).parameters
    unknown = next((spec.name for spec in constants if spec.name not in parameters), None)
    if unknown is not None:
        raise InputError(
            f"{type(model).__name__}.forward takes no {unknown!r}, which is a constant of `inputs`"
        )
    made = copy.copy(model)
    bound = isinstance(original, MethodType) and original.__self__ is model
    forward: Callable[..., Any] = MethodType(original.__func__, made) if bound else original

    def without(**tensors: torch.Tensor) -> Any:
        return forward(**tensors, **constant_tensors(constants))

    names = {spec.name for spec in constants}
    others = [
        p.replace(kind=p.KEYWORD_ONLY) if p.kind is p.POSITIONAL_OR_KEYWORD else p
        for p in parameters.values()
        if p.name not in names
    ]
    cast(Any, without).__signature__ = inspect.Signature(others)
    cast(Any, without).constants = tuple(constants)
    made.forward = without
    return made


def base_with_constants(base: Base, constants: Sequence[InputSpec], notes: Iterable[str]) -> Base:
    """A base whose model takes some inputs as constants; a call of what is made of it may still give them."""
    base = replace(base, notes=[*base.notes, *notes])
    if not constants:
        return base
    return replace(
        base,
        model=with_constants(cast(nn.Module, base.model), constants),
        constants=tuple(constants),
        flatten=partial(without_constants, constants=tuple(constants)),
    )


def has_constants(model: nn.Module, inputs: Sequence[InputSpec]) -> bool:
    """Whether a model reads in Python what is the same in every call: a constant, or images of a fixed number."""
    in_texts = any(spec.placeholders for spec in inputs)
    images = [spec for spec in inputs if spec.name == "pixel_values"]
    fixed = in_texts and any(all(isinstance(size, int) for size in spec.dims) for spec in images)
    return fixed or hasattr(model.forward, "constants")


def constant_note(spec: InputSpec) -> str:
    """What a person is told of a constant."""
    return (
        f"{spec.name} is {spec} in every product: the model reads it in Python (to change it, write `inputs`)"
    )


def without_constants(
    args: Sequence[object], given: Mapping[str, object], constants: Sequence[InputSpec]
) -> dict[str, Any]:
    """The tensors of a call by name, without those that are constants.

    Raises:
        InputError: one of them has another value than in the trace, or the call gives a tensor by its position.
    """
    if args:
        raise InputError("expected every input by its name", f"such as {next(iter(given), 'input_ids')}=...")
    for name, tensor in constant_tensors(constants).items():
        value: Any = torch.as_tensor(cast(Any, given.get(name, tensor))).cpu()
        if not torch.equal(value.to(tensor.dtype), tensor):
            stated = next(spec for spec in constants if spec.name == name)
            raise InputError(
                f"{name} is {stated} in the trace, got {value.tolist()}",
                "compile it again with that value under `inputs`",
            )
    names = {spec.name for spec in constants}
    return {name: value for name, value in given.items() if name not in names}


@contextmanager
def constants_followed() -> Generator[None]:
    """A context in which the values of `torch.tensor`, and what is computed of them, are known in a trace."""
    originals = fake_tensor.CONSTANT_NUMEL_LIMIT, torch.arange
    fake_tensor.CONSTANT_NUMEL_LIMIT = LARGEST
    torch.arange = _arange(torch.arange)
    try:
        yield
    finally:
        fake_tensor.CONSTANT_NUMEL_LIMIT, torch.arange = originals


def _arange(arange: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`torch.arange` whose values are known where its bounds are numbers."""

    def counted(*bounds: Any, **options: Any) -> torch.Tensor:
        if (
            not bounds
            or not all(type(bound) is int for bound in bounds)
            or set(options) - {"dtype", "device"}
        ):
            return arange(*bounds, **options)
        made: Any = {"dtype": torch.int64} | options
        return torch.tensor(list(range(*bounds)), **made)

    return counted
