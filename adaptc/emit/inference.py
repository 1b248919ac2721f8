"""For inference: the graph as an exporter wants it."""

from __future__ import annotations

from adaptc.emit.evaluate import Evaluate
from adaptc.graph import Graph
from adaptc.pipeline import PASSES, run


def inference_graph(graph: Graph) -> Graph:
    """A copy that only evaluates, as an exporter wants it: integers are plain, and see `Evaluate`."""
    return run(graph, [PASSES["plain-integers"](), Evaluate()])
