"""A Hugging Face model that is handed in: set for the trace as one of a directory is, in a copy without its tensors."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adaptc.inputs import InputSpec
from adaptc.ir.base import Base
from adaptc.tracing.constants import base_with_constants
from adaptc.tracing.huggingface.heads import heads_of
from adaptc.tracing.huggingface.inputs import chosen_inputs
from adaptc.tracing.huggingface.processor import given_inputs
from adaptc.tracing.huggingface.settings import alternative_notes, set_for_tracing

PRETRAINED = "transformers.modeling_utils.PreTrainedModel"
"""The full name of the class of every model of transformers. By name, so that it is not imported for any other."""


def is_pretrained(model: nn.Module) -> bool:
    """Whether a module is a model of transformers."""
    return any(f"{cls.__module__}.{cls.__qualname__}" == PRETRAINED for cls in type(model).__mro__)


def pretrained(model: nn.Module | None) -> nn.Module | None:
    """A module if it is a model of transformers."""
    return model if model is not None and is_pretrained(model) else None


def set_copy(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """A model of transformers as it is traced: without a cache or layer drop; the caller's own stays as it is.

    Returns:
        A copy that shares every tensor with the model, and a note for each setting; any other module as it is.
    """
    if not is_pretrained(model):
        return model, ()
    copied: Any = copy.deepcopy(model, {id(tensor): tensor for tensor in _tensors(model)})
    notes = [*set_for_tracing(copied.config, copied), *alternative_notes(copied)]
    return copied, tuple(notes)


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """Every parameter and buffer, and every tensor that a module keeps beside them."""
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        yield from (value for value in vars(module).values() if isinstance(value, torch.Tensor))


def with_chosen_inputs(base: Base, inputs: Sequence[InputSpec]) -> Base:
    """The base of a model in memory with the inputs that are stated, or else with those of its directory.

    Raises:
        TraceError: they cannot be derived, or images are stated that the model cannot be traced with.
    """
    model: Any = base.model
    config = copy.copy(model.config)
    config.dtype = model.dtype
    directory = str(getattr(config, "_name_or_path", ""))
    is_stored = directory != "" and Path(directory).is_dir()
    given, notes = given_inputs(directory, trust=False) if is_stored else (None, [])
    derived = chosen_inputs(model, config, inputs, given)
    chosen = replace(
        base,
        inputs=derived.inputs,
        left_out=derived.left_out,
        heads=heads_of(model),
        notes=[*base.notes, *notes],
    )
    return base_with_constants(chosen, derived.constants, derived.notes)
