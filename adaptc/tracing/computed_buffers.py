"""The buffers of a Hugging Face model that are in no checkpoint: computed by its classes, as transformers does."""

# The tensors of a module are replaced in torch's own dicts.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from adaptc.errors import TraceError

INITIALISED = "_is_hf_initialized"
"""The attribute by which transformers tells tensors that it must not initialise."""


def compute_buffers(model: nn.Module) -> None:
    """Replace every buffer that is in no checkpoint by a real one with its values, in place.

    A class computes its own, and may compute those of its parts, where transformers initialises weights.

    Raises:
        TraceError: the model's classes do not compute one.
    """
    buffers = [
        (module, name)
        for module in model.modules()
        for name in sorted(module._non_persistent_buffers_set)
        if module._buffers.get(name) is not None
    ]
    for module, name in buffers:
        module._buffers[name] = _unset(cast(torch.Tensor, module._buffers[name]))
    holders = {module for module, _ in buffers}
    with _weights_left_alone(model):
        for module, whole in _with_their_models(model, model):
            if not holders.isdisjoint(module.modules()):
                cast(Any, whole)._init_weights(module)
    for module, name in buffers:
        if _is_unset(cast(torch.Tensor, module._buffers[name])):
            raise TraceError(
                f"{type(module).__name__}.{name} is in no checkpoint, and the model's class does not compute it",
                "hand in the model itself: adaptc.compile(spec, model=...)",
            )


@contextmanager
def _weights_left_alone(model: nn.Module) -> Generator[None]:
    """Let transformers pass over parameters within a `with` block: they have no values, which some classes read."""
    parameters = [p for p in model.parameters() if not hasattr(p, INITIALISED)]
    for parameter in parameters:
        setattr(parameter, INITIALISED, True)
    try:
        yield
    finally:
        for parameter in parameters:
            delattr(parameter, INITIALISED)


def _with_their_models(module: nn.Module, whole: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Every module, parts first, and the innermost model of transformers that it is in, such as a vision tower."""
    whole = module if hasattr(module, "_init_weights") else whole
    for child in module.children():
        yield from _with_their_models(child, whole)
    yield module, whole


def _unset(buffer: torch.Tensor) -> torch.Tensor:
    """A real tensor on the CPU like a buffer, of values that none has: NaN, or the lowest integer."""
    floats = buffer.is_floating_point() or buffer.is_complex()
    value = float("nan") if floats else 0 if buffer.dtype == torch.bool else torch.iinfo(buffer.dtype).min
    return torch.full(tuple(buffer.shape), value, dtype=buffer.dtype, device="cpu")


def _is_unset(buffer: torch.Tensor) -> bool:
    """Whether all values are those of `_unset`; of booleans nobody can tell."""
    if buffer.dtype == torch.bool or not buffer.numel():
        return False
    return bool(buffer.isnan().all()) or torch.equal(buffer, _unset(buffer))
