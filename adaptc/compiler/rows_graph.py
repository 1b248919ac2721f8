"""The graph in which each row of a batch has its own alternative."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from adaptc.compiler.schedule import lowering
from adaptc.ir.graph import Graph
from adaptc.rewriter.pipeline import PASSES, Pass, run
from adaptc.rewriter.rows.merge import MergeRows


def merged_rows(base: Graph, alternatives: Sequence[Graph]) -> Graph:
    """Merge adapted graphs into one.

    Products with adapted weights are split as for a single token: each row has an adapted weight of its own, so that
    none is ever worth building.

    Args:
        base: the adapted graph of what is always on.
        alternatives: that with each alternative.

    Raises:
        RefusedError: there are no rows, or rows meet.
    """
    return run(split(base), [MergeRows(tuple(split(other) for other in alternatives))])


def split(adapted: Graph) -> Graph:
    """An adapted graph as it is run live, whatever building a weight would save."""
    factor: Any = PASSES["factor"]
    passes: list[Pass] = [
        factor(tokens=1) if isinstance(item, PASSES["factor"]) else item for item in lowering(adapted)
    ]
    return run(adapted, passes)


def sizes_of(graphs: Sequence[Graph]) -> dict[str, list[list[int]]]:
    """The outputs whose fixed sizes differ between graphs: name -> their sizes in each graph, -1 for any size."""
    first, sizes = graphs[0], dict[str, list[list[int]]]()
    outputs = [next(node for node in graph.nodes if node.op == "output") for graph in graphs]
    for name, *nodes in zip(first.outputs, *(_results(output) for output in outputs), strict=True):
        values = [getattr(node, "meta", {}).get("val") for node in nodes]
        shapes = [
            [size if isinstance(size, int) else -1 for size in value.shape]
            for value in values
            if isinstance(value, torch.Tensor)
        ]
        if any(shape != shapes[0] for shape in shapes):
            sizes[name] = shapes
    return sizes


def _results(output: Any) -> list[Any]:
    results: Any = output.args[0]
    return list(results) if isinstance(results, (list, tuple)) else [results]
