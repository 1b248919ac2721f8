"""Images in a text: the tokens that hold their places."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from adaptc.inputs import InputSpec

IMAGES = "pixel_values"
MARKS = ("token_type_ids", "mm_token_type_ids")
"""Inputs that are 1 where a token holds the place of an image."""


def image_token(config: object) -> int | None:
    """The token that holds the place of an image's features in a text; None for a model without one."""
    return getattr(config, "image_token_id", getattr(config, "image_token_index", None))


def with_image_tokens(model: nn.Module, config: object, inputs: Sequence[InputSpec]) -> tuple[InputSpec, ...]:
    """The inputs of a model that puts images into a text, with the tokens that hold their places.

    Args:
        model: the model; its weights may be fake.
        config: its configuration.
        inputs: its inputs; where no image is among them they stay as they are.

    Raises:
        Exception: whatever the model raises where one image of this size alone is not all that it needs.
    """
    token, images = image_token(config), next((spec for spec in inputs if spec.name == IMAGES), None)
    if token is None or images is None:
        return tuple(inputs)
    count = _tokens_of_an_image(model, config, images)
    values = {"input_ids": token, **dict.fromkeys(MARKS, 1)}
    return tuple(
        replace(spec, placeholders=(values[spec.name], count)) if spec.name in values else spec
        for spec in inputs
    )


def _tokens_of_an_image(model: nn.Module, config: object, images: InputSpec) -> int:
    """How many rows of features a model makes of one image, on fake tensors."""
    fake = (tensor for tensor in model.parameters() if isinstance(tensor, FakeTensor))
    mode = next((tensor.fake_mode for tensor in fake), None) or FakeTensorMode(allow_non_fake_inputs=True)
    sizes = [size for size in images.dims[1:] if isinstance(size, int)]
    with mode, torch.no_grad():
        pixels = torch.empty([1, *sizes], dtype=getattr(torch, images.dtype))
        features: Any = cast(Any, model).get_image_features(pixel_values=pixels, return_dict=True)
    rows = features.pooler_output
    rows = [rows] if isinstance(rows, torch.Tensor) else rows
    return sum(math.prod(row.shape[:-1]) for row in cast("list[torch.Tensor]", rows))
