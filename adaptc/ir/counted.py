"""Inputs that a model counts itself: the positions of a decoder's tokens, where a call leaves them out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from adaptc.inputs import InputSpec

COUNTED = "adaptc.counted"
"""The key in a module's `meta`: name of an input that may be left out -> the input whose tokens are counted."""


def counted_by(inputs: Sequence[InputSpec]) -> dict[str, str]:
    """Each input that may be left out -> another with the same dimensions, whose tokens are counted."""
    counted: dict[str, str] = {}
    for spec in inputs:
        others = [other.name for other in inputs if other.dims == spec.dims and not other.counted]
        if spec.counted and others:
            counted[spec.name] = others[0]
    return counted


def with_counted(counted: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors with `0..n-1` in every row of each input that is left out, as the model itself counts."""
    missing = {
        name: tensors[like] for name, like in counted.items() if name not in tensors and like in tensors
    }
    rows = {
        name: torch.arange(like.shape[-1], device=like.device).expand(like.shape)
        for name, like in missing.items()
    }
    return {**tensors, **rows}


def let_count(module: fx.GraphModule, counted: Mapping[str, str]) -> None:
    """Let calls of a module leave out what the model counts itself.

    Args:
        module: changed in place.
        counted: as `counted_by` gives it.
    """
    if not counted:
        return
    module.meta[COUNTED] = dict(counted)
    # read here, since torch.compile does not follow a graph's nodes
    names = [str(node.target) for node in module.graph.nodes if node.op == "placeholder"]

    def fill(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        given = dict(zip(names, args, strict=False))
        filled = with_counted(counted, {**given, **kwargs})
        return args, {name: value for name, value in filled.items() if name not in given}

    def register(counting: Any) -> None:
        counting.register_forward_pre_hook(fill, with_kwargs=True)

    register(module)
    copies: Any = module
    copies._register_deepcopy_hook(register)  # torch copies no other hooks of a graph module
