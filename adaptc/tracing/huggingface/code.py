"""What transformers' own code does that a trace cannot follow, replaced by what it can while a model is traced."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import fx
from torch.fx import traceback

from adaptc.errors import TraceError
from adaptc.ir.nodes import operation, provenance

TOGETHER = "adaptc.rows_together"
"""The annotation of a node that gives the rows of a tensor as one."""


@contextmanager
def masks_by_broadcasting() -> Generator[None]:
    """A context in which transformers makes a mask of a function of indices by broadcasting, not by `torch.vmap`."""
    masks: Any = sys.modules.get("transformers.masking_utils")

    def expanded(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def mask(*indices: torch.Tensor) -> torch.Tensor:
            sizes = [index.shape[0] for index in indices]
            return function(*masks._non_vmap_expansion_sdpa(*indices)).expand(sizes)

        return mask

    replaced = {"_vmap_expansion_sdpa": expanded, "TransformGetItemToIndex": nullcontext}
    originals = {name: getattr(masks, name) for name in replaced} if masks is not None else {}
    for name in originals:
        setattr(masks, name, replaced[name])
    try:
        yield
    finally:
        for name, value in originals.items():
            setattr(masks, name, value)


@contextmanager
def images_together() -> Generator[None]:
    """A context in which iterating over the rows of a tensor whose number is open gives all of them as one.

    Some models make a list of the images of a batch and concatenate it again. The list would fix their number.
    `check_images_together` finds whatever else is done with such a list.
    """
    tensors: Any = torch.Tensor
    iterate, length = tensors.__iter__, tensors.__len__

    def is_open(tensor: torch.Tensor) -> bool:
        return tensor.dim() > 2 and isinstance(tensor.shape[0], torch.SymInt)

    def rows(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
        if not is_open(tensor):
            return iterate(tensor)
        with traceback.annotate({TOGETHER: True}):
            return iter((tensor.flatten(0, 1),))

    def count(tensor: torch.Tensor) -> int:
        return 1 if is_open(tensor) else length(tensor)

    tensors.__iter__, tensors.__len__ = rows, count
    try:
        with traceback.preserve_node_meta():
            yield
    finally:
        tensors.__iter__, tensors.__len__ = iterate, length


@contextmanager
def images_not_empty() -> Generator[list[str]]:
    """A context in which no pixel is compared with zero, so that no image is dropped from a batch as padding.

    Some models fill a batch up with images of zeros, which they drop again: the number of images would follow from the
    values of the pixels.

    Yields:
        a note for the person, once a model has compared pixels.
    """
    tensors: Any = torch.Tensor
    equal, notes = tensors.__eq__, list[str]()

    def compared(tensor: torch.Tensor, other: object) -> torch.Tensor:
        if type(other) is not float or other != 0.0 or tensor.dim() < len("nchw"):
            return equal(tensor, other)
        notes[:] = [
            "an image of zeros is an image like any other: the model itself drops it from the batch as padding"
        ]
        return torch.tensor(False).expand(tensor.shape)

    tensors.__eq__ = compared
    try:
        yield notes
    finally:
        tensors.__eq__ = equal


def check_images_together(nodes: Iterable[fx.Node]) -> None:
    """Check that rows that were given as one are only concatenated, along their first dimension.

    Raises:
        TraceError: names the author's line of what does anything else with them.
    """
    for node in nodes:
        if not node.meta.pop("custom", {}).get(TOGETHER):
            continue
        for user in node.users:
            if user.target is not torch.ops.aten.cat.default or (*user.args, 0)[1] != 0:
                raise TraceError(
                    f"a loop over the images of a batch does more than concatenate them: {operation(user)}",
                    *provenance(user),
                    "write `inputs` with a number in place of batch, or without pixel_values",
                )
