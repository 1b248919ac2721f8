"""What layers are given when the model runs on calibration rows."""

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
    """The inputs `(tokens, in)` of products with some sites' weights, in float32.

    Taken in one sweep, when the first is asked for; sites that read the same value share it.

    Args:
        graph: the model as it is before it is quantized.
        sites: the layers.
        rows: batches of the model's inputs.
        tokens: rows of a layer's input that are kept at most, evenly taken from all of them.
    """

    def __init__(self, graph: Graph, sites: Sequence[WeightSite], rows: Sequence[Batch], tokens: int):
        self.graph, self.rows, self.tokens = graph, rows, tokens
        nodes = graph.by_name()
        self._read = {site.name: _operand(nodes[site.node]) for site in sites}
        self._known: dict[str, torch.Tensor] | None = None

    def of(self, site: WeightSite) -> Callable[[], torch.Tensor | None]:
        """What gives a layer's inputs; None of a layer that looks up, or is no plain product.

        Raises:
            InputError: when asked, if the model takes none of the rows.
        """
        name = self._read[site.name]
        return lambda: None if name is None else self._all()[name]

    def _all(self) -> dict[str, torch.Tensor]:
        if self._known is None:
            if not self.rows:
                raise InputError("it is chosen by the layers' inputs: give it `calibration`")
            wanted = {name for name in self._read.values() if name}
            found: dict[str, list[torch.Tensor]] = {name: [] for name in wanted}
            each = -(-self.tokens // max(1, len(self.rows)))

            def keep(node: fx.Node, value: torch.Tensor) -> None:
                if node.name in found:
                    found[node.name].append(
                        thinned(value.detach().float().reshape(-1, value.shape[-1]), each)
                    )

            outcomes = observed(self.graph, self.rows, keep)
            failed = [o for o in outcomes if isinstance(o, Exception)]
            if len(failed) == len(outcomes):
                raise InputError(f"calibration: the model takes none of the rows: {failed[0]}") from failed[0]
            self._known = {name: torch.cat(values) for name, values in found.items()}
        return self._known


def thinned(rows: torch.Tensor, count: int) -> torch.Tensor:
    """At most so many of these rows, evenly taken."""
    return rows if len(rows) <= count else rows[torch.linspace(0, len(rows) - 1, count).long()]


def _operand(node: fx.Node) -> str | None:
    """The node that is multiplied by the weight here; None where it is looked up, or no plain product."""
    read = as_affine_map(node)
    return read.x.name if read is not None and isinstance(read.affine, Linear) else None
