"""Gradient checkpointing: activations are computed again in the backward pass, in segments that the graph shows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import fx

from adaptc.ir.cost import example_shapes
from adaptc.ir.graph import Graph
from adaptc.ir.nodes import ADAPTATION, CUT, memory_owner, writes_in_place
from adaptc.rewriter.pipeline import Pass, graph_pass

Segments = Annotated[
    int | None, Field(gt=1, description="how many; as many as need the least memory if left out")
]


@graph_pass("gradient-checkpointing")
@dataclass(frozen=True)
class GradientCheckpointing(Pass):
    """Mark where segments end: at activations that are the only ones later operations need, a residual stream say.

    Chen et al. 2016, section 4: only the activations at the ends are kept for the gradient; those between them are
    computed again, a segment at a time. A residual stream has such an activation after every sub-layer. An end may
    also be needed later, as an encoder's output is.
    """

    segments: Segments = None

    def call(self, graph: Graph) -> bool:
        """Mark the ends of segments."""
        cuts = _cuts(graph)
        chosen = self._chosen(graph, cuts)
        for node in chosen:
            node.meta[CUT] = True
        return bool(chosen)

    def _chosen(self, graph: Graph, cuts: Sequence[fx.Node]) -> Sequence[fx.Node]:
        """As many ends as asked for, evenly spaced; else as many as hold the fewest numbers at the peak."""
        if self.segments is not None:
            return _evenly(cuts, self.segments - 1)
        sizes = _sizes(graph)
        return min((_evenly(cuts, n) for n in range(len(cuts) + 1)), key=lambda cuts: _peak(cuts, sizes))


def _cuts(graph: Graph) -> list[fx.Node]:
    """The activations that are all that later operations need, besides earlier such ones."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    last = {node: max((order[user] for user in node.users), default=-1) for node in order}
    activations: set[fx.Node] = set()
    needed: set[fx.Node] = set()
    cuts: list[fx.Node] = []
    parameters = set(graph.weights) - graph.buffers
    for node in order:
        if node.op != "call_function":
            continue
        weighted = any(n.op == "get_attr" and n.target in parameters for n in node.all_input_nodes)
        value = node.meta.get("val")
        floating = isinstance(value, torch.Tensor) and value.dtype.is_floating_point
        from_weights = weighted or "quantized" in node.meta or activations.intersection(node.all_input_nodes)
        if floating and from_weights:
            activations.add(node)
            needed.add(node)
        needed = {n for n in needed if last[n] > order[node]}
        if node in needed and needed - set(cuts) == {node} and not _is_weight(node):
            cuts.append(node)
    written = _written(graph, order)
    return [node for node in cuts if not any(first <= order[node] < last for first, last in written)]


def _written(graph: Graph, order: Mapping[fx.Node, int]) -> list[tuple[int, int]]:
    """The values that a later operation writes to, as pairs of positions: where each is made, and where it is written.

    No segment may end between the two: computed again, it would start from what was written.
    """
    written: list[tuple[int, int]] = []
    for node in graph.nodes:
        if node.op == "call_function" and writes_in_place(node.target):
            value = memory_owner(node)
            if value.op == "call_function":
                written.append((order[value], order[node]))
    return written


def _is_weight(node: fx.Node) -> bool:
    """Whether a node is an expression of weights, or dequantized, so no activation."""
    return node.meta.get(ADAPTATION) is not None or "quantized" in node.meta


def _sizes(graph: Graph) -> dict[fx.Node, int]:
    """Operation -> how many numbers its value has, for the example sizes that plans count with; as executed."""
    shape = example_shapes(graph)
    return {
        node: math.prod(shape(node.meta["val"]))
        for node in graph.nodes
        if node.op == "call_function" and isinstance(node.meta.get("val"), torch.Tensor)
    }


def _peak(cuts: Sequence[fx.Node], sizes: dict[fx.Node, int]) -> int:
    """How many numbers are held at the peak: those of the ends, and all of the largest segment."""
    ends, segment, largest = set(cuts), 0, 0
    for node, size in sizes.items():
        segment += size
        largest = max(largest, segment)
        if node in ends:
            segment = 0
    return largest + sum(sizes[node] for node in cuts)


def _evenly(cuts: Sequence[fx.Node], count: int) -> list[fx.Node]:
    """As many of the cuts as `count`, evenly spaced; all where there are no more."""
    if count >= len(cuts):
        return list(cuts)
    return [cuts[round((i + 1) * (len(cuts) + 1) / (count + 1)) - 1] for i in range(count)]
