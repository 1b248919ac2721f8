"""What transformers' own code does that a trace cannot follow, replaced by what it can while a model is traced.

Each replacement computes the same where models use it as meant. The proof of the trace finds a model that does not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch


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
    """
    tensors: Any = torch.Tensor
    iterate, length = tensors.__iter__, tensors.__len__

    def is_open(tensor: torch.Tensor) -> bool:
        return tensor.dim() > 2 and isinstance(tensor.shape[0], torch.SymInt)

    def rows(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
        return iter((tensor.flatten(0, 1),)) if is_open(tensor) else iterate(tensor)

    def count(tensor: torch.Tensor) -> int:
        return 1 if is_open(tensor) else length(tensor)

    tensors.__iter__, tensors.__len__ = rows, count
    try:
        yield
    finally:
        tensors.__iter__, tensors.__len__ = iterate, length
