"""Images in a text: the layout in which a model takes them, and the tokens that hold their places."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from adaptc.errors import TraceError
from adaptc.inputs import InputSpec
from adaptc.tracing.constants import constant_tensors, constants_followed
from adaptc.tracing.huggingface.code import images_not_empty
from adaptc.tracing.image_layouts import IMAGES, Layout, layouts

MARKS = ("token_type_ids", "mm_token_type_ids")
"""Inputs that are 1 where a token holds the place of an image."""
TURNS = "int64[3, batch, seq]"
"""Positions in a text of images: by time, row and column."""
LENGTH = 8
"""How long a text is that a model is tried with."""


@dataclass(frozen=True)
class WithImages:
    """The inputs of a model that takes images beside a text.

    Attributes:
        inputs: those of a call, with the tokens that hold the places of images.
        constants: what the model reads of the images in Python, the same in every call.
        notes: what the model computes otherwise than by itself, for the person.
    """

    inputs: tuple[InputSpec, ...]
    constants: tuple[InputSpec, ...] = ()
    notes: tuple[str, ...] = ()


def image_token(config: object) -> int | None:
    """The token that holds the place of an image's features in a text; None for a model without one."""
    return getattr(config, "image_token_id", getattr(config, "image_token_index", None))


def takes_images(model: nn.Module, config: object) -> bool:
    """Whether a model puts images into a text."""
    parameters = inspect.signature(model.forward).parameters
    return image_token(config) is not None and {IMAGES, "input_ids"} <= set(parameters)


def in_first_layout(model: nn.Module, config: object, inputs: Sequence[InputSpec], dtype: str) -> WithImages:
    """The inputs of a model with images in the first layout with which it runs.

    Args:
        model: the model; its weights may be fake.
        config: its configuration.
        inputs: its inputs; an image among them is left out.
        dtype: of images.

    Raises:
        TraceError: it runs with none; the reason is that of the first.
    """
    parameters = inspect.signature(model.forward).parameters
    others = [spec for spec in inputs if spec.name != IMAGES]
    reasons: list[str] = []
    for layout in layouts(config, parameters, _reads_sizes(model)):
        candidate = WithImages(_beside(model, others, layout, dtype), layout.constants)
        try:
            return with_image_tokens(model, config, candidate)
        except Exception as error:  # whatever the model raises where images are given in another layout
            reasons.append((str(error).strip().splitlines() or [type(error).__name__])[0])
    raise TraceError(next(iter(reasons), "its configuration says nothing of the size of images"))


def _reads_sizes(model: nn.Module) -> bool:
    """Whether the part of a model that sees images reads their sizes."""
    taken = [inspect.signature(module.forward).parameters for module in model.modules()]
    return any("image_sizes" in names and "input_ids" not in names for names in taken)


def _beside(
    model: nn.Module, others: Sequence[InputSpec], layout: Layout, dtype: str
) -> tuple[InputSpec, ...]:
    """The inputs beside images in a layout: as many texts as there are images, where their number is fixed."""
    specs = list(others)
    turns = any(hasattr(module, "get_rope_index") for module in model.modules())
    if layout.constants and turns:
        specs = [spec for spec in specs if spec.name != "position_ids"]
        specs.append(replace(InputSpec.parse("position_ids", TURNS), counted=True))
    specs.append(InputSpec(IMAGES, dtype, layout.pixels))
    if "batch" in layout.pixels:
        return tuple(specs)
    return tuple(replace(spec, dims=tuple(1 if d == "batch" else d for d in spec.dims)) for spec in specs)


def with_image_tokens(model: nn.Module, config: object, given: WithImages) -> WithImages:
    """The inputs of a model that puts images into a text, with the tokens that hold their places.

    Args:
        model: the model; its weights may be fake.
        config: its configuration.
        given: its inputs; where no image is among them they stay as they are.

    Raises:
        TraceError: the texts cannot hold as many tokens in each row.
        Exception: whatever the model raises where these images are not all that it needs.
    """
    token, images = image_token(config), next((spec for spec in given.inputs if spec.name == IMAGES), None)
    if token is None or images is None:
        return given
    (ids,) = [spec for spec in given.inputs if spec.name == "input_ids"] or [None]
    rows = ids.dims[0] if ids is not None else 1
    texts = rows if isinstance(rows, int) else 1
    if isinstance(rows, str) and images.dims[0] != rows:
        raise TraceError(
            f"the number of images is fixed: {images}, and so is that of texts",
            f"write a number in place of `{rows}` in every input",
        )
    with images_not_empty() as notes:
        count = _tokens_of_images(model, given)
    if count % texts:
        raise TraceError(
            f"{texts} texts cannot share {count} tokens of images: write as many images for each text"
        )
    values = {"input_ids": token, **dict.fromkeys(MARKS, 1)}
    inputs = tuple(
        replace(spec, placeholders=(values[spec.name], count // texts)) if spec.name in values else spec
        for spec in given.inputs
    )
    return WithImages(inputs, given.constants, tuple(notes))


class _CountedError(Exception):
    """The rows of features that a model has made of images."""

    def __init__(self, count: int):
        self.count = count


def _tokens_of_images(model: nn.Module, given: WithImages) -> int:
    """How many rows of features a model makes of its images, on fake tensors; of one image where any number may be."""
    fake = (tensor for tensor in model.parameters() if isinstance(tensor, FakeTensor))
    mode = next((tensor.fake_mode for tensor in fake), None) or FakeTensorMode(allow_non_fake_inputs=True)
    with mode, torch.no_grad(), constants_followed():
        tensors = {spec.name: _empty(spec) for spec in given.inputs} | constant_tensors(given.constants)
        with _stopped_at_features(model) as stops:
            if stops:
                try:
                    model(**tensors)
                except _CountedError as counted:
                    return counted.count
        return _rows_of_features(model, tensors)


def _empty(spec: InputSpec) -> torch.Tensor:
    sizes = [size if isinstance(size, int) else 1 if size == spec.dims[0] else LENGTH for size in spec.dims]
    return torch.empty(sizes, dtype=getattr(torch, spec.dtype))


@contextmanager
def _stopped_at_features(model: nn.Module) -> Generator[bool]:
    """A context in which a model stops where it looks for the places of its images' features; whether it does look."""
    looking = [module for module in model.modules() if hasattr(module, "get_placeholder_mask")]

    def stop(look: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(look)

        def counted(*args: Any, **kwargs: Any) -> Any:
            features = signature.bind(*args, **kwargs).arguments.get("image_features")
            if features is None:
                return look(*args, **kwargs)
            raise _CountedError(math.prod(features.shape[:-1]))

        return counted

    for module in looking:
        vars(module)["get_placeholder_mask"] = stop(cast(Any, module).get_placeholder_mask)
    try:
        yield bool(looking)
    finally:
        for module in looking:
            del vars(module)["get_placeholder_mask"]


def _rows_of_features(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> int:
    """How many rows of features the model makes, where it does not look for their places by itself."""
    makers = [module for module in model.modules() if hasattr(module, "get_image_features")]
    if not makers:
        raise TraceError(f"{type(model).__name__} has no get_image_features")
    parameters = inspect.signature(cast(Any, makers[0]).get_image_features).parameters
    taken = {name: tensor for name, tensor in tensors.items() if name in parameters}
    features: Any = cast(Any, makers[0]).get_image_features(**taken, return_dict=True)
    rows = features.pooler_output
    rows = [rows] if isinstance(rows, torch.Tensor) else rows
    return sum(math.prod(row.shape[:-1]) for row in cast("list[torch.Tensor]", rows))
