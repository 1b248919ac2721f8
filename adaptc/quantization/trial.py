"""A scheme tried on a small matrix when it is registered, so that its author hears of mistakes at once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

from adaptc.errors import DefinitionError, Fault
from adaptc.methods.trial import instance_of
from adaptc.methods.trial_sites import numbers
from adaptc.registry.definitions import Definition
from adaptc.registry.trials import Trials

if TYPE_CHECKING:
    from torch import Tensor

ROWS, COLUMNS, TOKENS = 8, 64, 32
"""Sizes of the matrix that a scheme is tried on, and rows of its inputs."""


def _attempt(definition: Definition) -> None:
    """Try a scheme on a small matrix."""
    scheme = instance_of(definition)
    if scheme is not None:
        _try(definition, scheme)


TRIALS = Trials(_attempt)
"""The trials of schemes: when one is registered, or first quantizes."""


def _try(definition: Definition, scheme: Any) -> None:
    try:
        json.dumps(vars(scheme))
    except TypeError as error:
        raise definition.mistake(f"its options are stored as JSON: {error}") from error
    fault = _called(definition, scheme, "refuses", ROWS, COLUMNS)
    if fault is not None:
        if not isinstance(fault, Fault):
            raise definition.mistake(f"refuses gives a Fault or None, got {fault!r}", "refuses")
        return
    stored = _called(definition, scheme, "stored", ROWS, COLUMNS)
    inputs = numbers(TOKENS, COLUMNS) if scheme.calibrated else None
    tensors = _called(definition, scheme, "quantize", numbers(ROWS, COLUMNS), inputs)
    if stored is None or tensors is None:
        return
    _check_tensors(definition, stored, tensors)
    constants: Mapping[str, Tensor] = scheme.constants()
    result = _called(definition, scheme, "dequantize", ROWS, COLUMNS, {**constants, **tensors})
    if result is None:
        return
    shape, dtype = getattr(result, "shape", None), str(getattr(result, "dtype", type(result).__name__))
    if shape != (ROWS, COLUMNS) or dtype != "torch.float32":
        got = f"{dtype} {list(shape or ())}"
        raise definition.mistake(
            f"dequantize gives torch.float32 [{ROWS}, {COLUMNS}], got {got}", "dequantize"
        )


def _is_mapping(value: object) -> TypeGuard[Mapping[str, Any]]:
    """Whether a hook gave a mapping, which its author's types may not say."""
    return isinstance(value, Mapping)


def _check_tensors(definition: Definition, stored: Mapping[str, Any], tensors: Any) -> None:
    """Check that `quantize` gives the tensors that `stored` states."""
    if not _is_mapping(tensors) or set(tensors) != set(stored):
        got = ", ".join(tensors) if _is_mapping(tensors) else type(tensors).__name__
        raise definition.mistake(f"quantize gives {got}, stored says {', '.join(stored)}", "quantize")
    for key, expected in stored.items():
        wanted = f"torch.{expected.dtype} {list(expected.shape)}"
        got = f"{tensors[key].dtype} {list(tensors[key].shape)}"
        if got != wanted:
            raise definition.mistake(f"quantize gives {key} as {got}, stored says {wanted}", "quantize")


def _called(definition: Definition, scheme: object, hook: str, *arguments: Any) -> Any:
    """The result of a hook, which must not write to its arguments; None where it does not run on so small a matrix."""
    import torch

    from adaptc.registry.calls import blamed, read_only

    tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
    mapping: Mapping[str, Any] = next((a for a in arguments if _is_mapping(a)), dict[str, Any]())
    watched = {**dict(zip(("W", "inputs"), tensors, strict=False)), **mapping}
    function = getattr(scheme, hook)

    def call(**_: torch.Tensor) -> Any:
        return function(*arguments)

    try:
        with torch.no_grad(), blamed("scheme", definition.name, function, hook):
            return read_only(call, (), (), watched)
    except DefinitionError as error:
        cause = error.__cause__
        if cause is None or isinstance(cause, TypeError | AttributeError | NameError | KeyError):
            raise
        return None
