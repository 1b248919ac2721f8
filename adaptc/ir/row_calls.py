"""Calls of a module that name the adapter of each row: their graph, and what they may name."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from adaptc.errors import InputError

IDS = "adapter_ids"
"""The argument that names the adapter of each row: its place in `adapters`, or -1 for the base."""


@dataclass(frozen=True)
class RowsGraph:
    """The graph of calls that name the adapter of each row.

    Attributes:
        graph: it reads the tensors of all adapters, takes the inputs by name and `adapter_ids`, and gives a flat tuple.
        constants: name -> tensors of its own.
        record: what an artifact says of it.
    """

    graph: fx.Graph
    constants: Mapping[str, torch.Tensor]
    record: Mapping[str, Any]


class RowCalls:
    """Makes the graph of calls that name the adapter of each row, when the first one comes.

    Args:
        make: gives the graph.

    Attributes:
        forward: its code, once it is made.
    """

    def __init__(self, make: Callable[[], RowsGraph]):
        self.make = make
        self.forward: Callable[..., Any] | None = None

    @functools.cached_property
    def graph(self) -> RowsGraph:
        """The graph."""
        return self.make()

    def __deepcopy__(self, memo: dict[int, Any]) -> RowCalls:
        """The same source: what it is made of is not copied with a module."""
        return RowCalls(self.make)


def check_ids(ids: torch.Tensor, names: Sequence[str]) -> None:
    """Check that every row names an adapter.

    Args:
        ids: `(rows,)`, integers.
        names: of the adapters, in their order.

    Raises:
        InputError: they are no integers, or one is out of range.
    """
    if ids.dim() != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise InputError(f"{IDS}: expected int64[batch], got {ids.dtype} {list(ids.shape)}")
    wrong = ids[(ids < -1) | (ids >= len(names))]
    if len(wrong):
        listed = ", ".join(f"{place} {name}" for place, name in enumerate(names))
        raise InputError(f"{IDS}: expected -1 (the base) to {len(names) - 1}, got {int(wrong[0])}", listed)
