"""What layers are given when the model runs on calibration rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import fx

from adaptc.errors import InputError
from adaptc.graph import Graph
from adaptc.multiplications import operands
from adaptc.sites import Site
from adaptc.streaming import observed

TOKENS = 4096
"""Rows of a layer's input that are kept at most: evenly taken from all of them."""


class LayerInputs:
    """The inputs `(tokens, in)` of products with some sites' weights, in float32.

    Taken in one sweep over all calibration rows, when the first is asked for; sites that read the same value share it.

    Args:
        graph: the model as it is before it is quantized.
        sites: the layers.
    """

    def __init__(self, graph: Graph, sites: Sequence[Site]):
        self.graph = graph
        nodes = graph.by_name()
        self._read = {site.name: _operand(nodes[site.uses[0].node]) for site in sites}
        self._known: dict[str, torch.Tensor] | None = None

    def of(self, site: Site) -> Callable[[], torch.Tensor]:
        """What gives a layer's inputs.

        Raises:
            InputError: when asked, if the model does not take a row.
        """
        return lambda: self._all()[self._read[site.name] or ""]

    def _all(self) -> dict[str, torch.Tensor]:
        if self._known is None:
            wanted = {name for name in self._read.values() if name}
            found: dict[str, list[torch.Tensor]] = {name: [] for name in wanted}

            def keep(node: fx.Node, value: torch.Tensor) -> None:
                if node.name in found:
                    found[node.name].append(value.detach().float().reshape(-1, value.shape[-1]))

            for number, error in enumerate(observed(self.graph, self.graph.rows, keep), 1):
                if isinstance(error, Exception):
                    raise InputError(f"calibration: the model does not take row {number}: {error}") from error
            self._known = {name: thinned(torch.cat(values)) for name, values in found.items()}
        return self._known


def thinned(rows: torch.Tensor) -> torch.Tensor:
    """At most `TOKENS` of these rows."""
    if len(rows) <= TOKENS:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, TOKENS).long()]


def _operand(node: fx.Node) -> str | None:
    """The node that is multiplied by the weight here; None where it is looked up, or no plain product."""
    read = operands(node)
    return read.x.name if read is not None and read.x.meta["val"].dtype.is_floating_point else None
