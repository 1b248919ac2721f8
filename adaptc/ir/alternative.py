"""An alternative of a module, and what others do for one: make it, forget it, write and read its checkpoints."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import fx

from adaptc.ir.conversion import META
from adaptc.ir.row_calls import RowsGraph

Entries = str | os.PathLike[str] | Sequence[Mapping[str, Any]]
"""What an alternative is made of: a checkpoint's folder, or a list of entries as under `adapters` in a spec."""


@dataclass(frozen=True)
class Alternative:
    """One graph of a module.

    Attributes:
        graph: it reads the tensors of the base, and its own.
        record: what the module's `meta` holds while it is active.
        tensors: the names of its own tensors.
        reads: those of them that the graph reads, in its order.
    """

    graph: fx.Graph
    record: Mapping[str, Any]
    tensors: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()

    @property
    def trained(self) -> list[str]:
        """The names of its own tensors that are trained."""
        return [name for name in self.record[META]["trainable"] if name in self.tensors]


class Maker(Protocol):
    """Makes and forgets the alternatives of a module: the compiler does."""

    def make(self, name: str, entries: Entries) -> fx.GraphModule:
        """The module with one more alternative, which shares the tensors of the base."""
        ...

    def forget(self, name: str) -> None:
        """Forget an alternative."""
        ...

    def rows(self) -> RowsGraph:
        """The graph of calls that name the adapter of each row, after alternatives have come or gone."""
        ...


class Files(Protocol):
    """Checkpoints of one alternative of a module."""

    def save(self, module: Any, name: str, directory: Path) -> None:
        """Write it."""
        ...

    def load(self, module: Any, name: str, directory: Path) -> None:
        """Replace its tensors."""
        ...
