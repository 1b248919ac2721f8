"""Gradient checkpointing: activations are computed again on the way back, in segments that the graph shows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import fx

from adaptc.ir.cost import example_shape, example_sizes
from adaptc.ir.graph import Graph
from adaptc.ir.nodes import ADAPTATION, CUT, memory_owner, writes_in_place
from adaptc.rewriter.pipeline import Pass, graph_pass

Segments = Annotated[
    int | None, Field(gt=1, description="how many; those that need the least memory if left out")
]


@graph_pass("gradient-checkpointing")
@dataclass(frozen=True)
class GradientCheckpointing(Pass):
    """Mark where segments end: at values that are all that later operations need of what weights have made so far.

    Chen et al. 2016, section 4: only these values are kept for the gradient; what lies between them is computed
    again, a segment at a time. Residual streams have such values behind every sub-layer. A value that was one
    already may be needed longer, as an encoder's output is.
    """

    segments: Segments = None

    def call(self, graph: Graph) -> bool:
        """Mark the ends."""
        cuts = _cuts(graph)
        chosen = self._chosen(graph, cuts)
        for node in chosen:
            node.meta[CUT] = True
        return bool(chosen)

    def _chosen(self, graph: Graph, cuts: Sequence[fx.Node]) -> Sequence[fx.Node]:
        """So many as asked for, evenly; else as many as keep the fewest numbers."""
        if self.segments is not None:
            return _evenly(cuts, self.segments - 1)
        sizes = _sizes(graph)
        return min((_evenly(cuts, n) for n in range(len(cuts) + 1)), key=lambda c: _kept(c, sizes))


def _cuts(graph: Graph) -> list[fx.Node]:
    """The values that are all that is needed behind them, but for earlier ones, of what weights have made."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    last = {node: max((order[user] for user in node.users), default=-1) for node in order}
    made: set[fx.Node] = set()
    needed: set[fx.Node] = set()
    found: list[fx.Node] = []
    parameters = set(graph.weights) - graph.buffers
    for node in order:
        if node.op != "call_function":
            continue
        weighted = any(n.op == "get_attr" and n.target in parameters for n in node.all_input_nodes)
        value = node.meta.get("val")
        active = isinstance(value, torch.Tensor) and value.dtype.is_floating_point
        if active and (weighted or "quantized" in node.meta or made.intersection(node.all_input_nodes)):
            made.add(node)
            needed.add(node)
        needed = {n for n in needed if last[n] > order[node]}
        if node in needed and needed - set(found) == {node} and not _is_weight(node):
            found.append(node)
    written = _written(graph, order)
    return [node for node in found if not any(first <= order[node] < last for first, last in written)]


def _written(graph: Graph, order: Mapping[fx.Node, int]) -> list[tuple[int, int]]:
    """Where values are made that a later operation writes to, and where it does.

    A segment that ended between would find its input written to already when it is computed again.
    """
    found = []
    for node in graph.nodes:
        if node.op == "call_function" and writes_in_place(node.target):
            value = memory_owner(node)
            if value.op == "call_function":
                found.append((order[value], order[node]))
    return found


def _is_weight(node: fx.Node) -> bool:
    """Whether this is an expression of weights, or what bits stand for: no activation."""
    return node.meta.get(ADAPTATION) is not None or "quantized" in node.meta


def _sizes(graph: Graph) -> dict[fx.Node, int]:
    """Numbers in the value of every operation, in its order, for the example that plans count with."""
    symbols = example_sizes(graph)
    return {
        node: math.prod(example_shape(node.meta["val"], symbols))
        for node in graph.nodes
        if node.op == "call_function" and isinstance(node.meta.get("val"), torch.Tensor)
    }


def _kept(cuts: Sequence[fx.Node], sizes: dict[fx.Node, int]) -> int:
    """Numbers held at the peak: the ends of segments, and all of the largest segment."""
    ends, segment, largest = set(cuts), 0, 0
    for node, size in sizes.items():
        segment += size
        largest = max(largest, segment)
        if node in ends:
            segment = 0
    return largest + sum(sizes[node] for node in cuts)


def _evenly(cuts: Sequence[fx.Node], count: int) -> list[fx.Node]:
    """So many of these, evenly taken."""
    if count >= len(cuts):
        return list(cuts)
    return [cuts[round((i + 1) * (len(cuts) + 1) / (count + 1)) - 1] for i in range(count)]
