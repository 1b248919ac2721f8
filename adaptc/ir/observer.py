"""The inputs that layers get when the model runs on calibration rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import fx

from adaptc.errors import InputError
from adaptc.ir.analysis.affine_maps import Linear, as_affine_map
from adaptc.ir.graph import Graph
from adaptc.ir.interpreter import Batch, observed
from adaptc.methods.site import WeightSite


class LayerInputs:
    """The inputs `(tokens, in)` of layers, in float32.

    The model runs once, when the first inputs are asked for. Layers that read the same value share it.

    Args:
        graph: the model before it is quantized.
        sites: the layers.
        rows: batches of the model's inputs.
        tokens: how many rows of a layer's input are kept at most, evenly spaced over all of them.
    """

    def __init__(self, graph: Graph, sites: Sequence[WeightSite], rows: Sequence[Batch], tokens: int):
        self.graph, self.rows, self.tokens = graph, rows, tokens
        nodes = graph.by_name()
        self._read = {site.name: _operand(nodes[site.node]) for site in sites}
        """Name of a site -> name of the node that it reads; None if the site is not a linear layer."""
        self._inputs: dict[str, torch.Tensor] | None = None

    def of(self, site: WeightSite) -> Callable[[], torch.Tensor | None]:
        """A function that gives a layer's inputs `(tokens, in)`, or None if the layer is not linear.

        The function raises `InputError` if there are no rows, or the model takes none of them.
        """
        name = self._read[site.name]
        return lambda: None if name is None else self._all()[name]

    def _all(self) -> dict[str, torch.Tensor]:
        """Name of a node -> its values on all rows; the model runs at the first call."""
        if self._inputs is None:
            if not self.rows:
                raise InputError("it is chosen by the layers' inputs: give it `calibration`")
            wanted = {name for name in self._read.values() if name}
            values: dict[str, list[torch.Tensor]] = {name: [] for name in wanted}
            tokens_per_row = -(-self.tokens // max(1, len(self.rows)))

            def keep(node: fx.Node, value: torch.Tensor) -> None:
                if node.name in values:
                    tokens = value.detach().float().reshape(-1, value.shape[-1])
                    values[node.name].append(thinned(tokens, tokens_per_row))

            outcomes = observed(self.graph, self.rows, keep)
            failed = [o for o in outcomes if isinstance(o, Exception)]
            if len(failed) == len(outcomes):
                raise InputError(f"calibration: the model takes none of the rows: {failed[0]}") from failed[0]
            self._inputs = {name: torch.cat(parts) for name, parts in values.items()}
        return self._inputs


def thinned(rows: torch.Tensor, count: int) -> torch.Tensor:
    """At most `count` of these rows, evenly spaced."""
    return rows if len(rows) <= count else rows[torch.linspace(0, len(rows) - 1, count).long()]


def _operand(node: fx.Node) -> str | None:
    """The name of the node that a linear layer multiplies by its weight; None if the node is no linear layer."""
    application = as_affine_map(node)
    if application is None or not isinstance(application.affine, Linear):
        return None
    return application.x.name
