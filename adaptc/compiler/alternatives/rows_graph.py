"""The graph in which each row of a batch has its own alternative."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import fx

from adaptc.compiler.plan.schedule import lowering
from adaptc.errors import RefusedError
from adaptc.ir.cost import EXAMPLE, flops, shown_bytes
from adaptc.ir.graph import Graph
from adaptc.ir.nodes import ADAPTATION, node_arg
from adaptc.rewriter.expression import FoldedWeight, extract_expression
from adaptc.rewriter.pipeline import PASSES, Pass, run
from adaptc.rewriter.rows.gather import CONSTANTS
from adaptc.rewriter.rows.merge import MergeRows
from adaptc.spec.spec import Spec


def merged_rows(base: Graph, alternatives: Sequence[Graph], trains: bool = False) -> Graph:
    """Merge adapted graphs into one.

    Products with adapted weights are split as for a single token: each row has an adapted weight of its own, so that
    none is ever worth building.

    Args:
        base: the adapted graph of what is always on.
        alternatives: that with each alternative.
        trains: keep dropout, so that adapters that differ in it are not computed alike.

    Raises:
        RefusedError: there are no rows, or rows meet.
    """
    first, *others = (
        split(graph) if trains else _without_dropout(split(graph)) for graph in (base, *alternatives)
    )
    return run(first, [MergeRows(tuple(others))])


def _without_dropout(graph: Graph) -> Graph:
    """A graph without dropout that follows the mode; it is changed."""
    for node in list(graph.nodes):
        if node.target is torch.ops.aten.dropout.default and isinstance(node.args[2], fx.Node):
            node.replace_all_uses_with(node_arg(node, 0))
            graph.module.graph.erase_node(node)
    return graph


def rows_notes(spec: Spec, base: Graph, alternatives: Sequence[Graph]) -> list[str]:
    """What a plan says of a program in which each row has its own adapter, where the spec emits one.

    Args:
        spec: the spec.
        base: the adapted graph of what is always on.
        alternatives: that with each alternative.

    Raises:
        SpecError: there can be none.
    """
    places = [i for i, entry in enumerate(spec.emit) if entry.format == "onnx" and entry.adapters == "rows"]
    if not places:
        return []
    try:
        merged = merged_rows(base, alternatives)
    except RefusedError as error:
        message = f"rows cannot have adapters of their own: {error.message}"
        raise spec.error(("emit", places[0], "adapters"), message, *error.notes) from error
    share = flops(merged) / max(1, flops(split(base)))
    stacks = shown_bytes(sum(_bytes(stack) for stack in _stacks(merged)))
    apart = sum(node.target is torch.ops.aten.where.self for node in merged.nodes)
    apart -= sum(node.target is torch.ops.aten.where.self for node in base.nodes)
    chosen = f"; {apart} values are computed for all rows and chosen" if apart > 0 else ""
    return [
        f"rows: {share:.2f} of the base's operations for {EXAMPLE}, stacks of {stacks} that rows gather from{chosen}"
    ]


def _bytes(node: fx.Node) -> int:
    value = node.meta["val"]
    return value.numel() * value.element_size()


def _stacks(graph: Graph) -> list[fx.Node]:
    """What rows gather their own from."""
    gathers = [node for node in graph.nodes if node.target is torch.ops.aten.index_select.default]
    sources = dict.fromkeys(node_arg(node, 0) for node in gathers)
    return [
        node for node in sources if node.target is not torch.ops.aten.index_select.default and _is_stack(node)
    ]


def _is_stack(node: fx.Node) -> bool:
    while node.target is torch.ops.aten.transpose.int:
        node = node_arg(node, 0)
    return node.target is torch.ops.aten.stack.default


def with_stacks(graph: Graph) -> Graph:
    """A merged graph whose stacks of weights are weights, to be computed once where it is written.

    Args:
        graph: is not changed.
    """
    graph = graph.copy()
    for number, stack in enumerate(_stacks(graph)):
        try:
            expression = extract_expression(graph, stack)
        except ValueError:  # of activations
            continue
        value, name = stack.meta["val"], f"{CONSTANTS}.stack_{number}"
        graph.attach(
            name, FoldedWeight(tuple(value.shape), value.dtype, expression), trained=False, stored=False
        )
        stack.replace_all_uses_with(graph.parameter_node(name))
    graph.clean()
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    lost = [a for a in graph.adaptations if not {name for name, _ in a.params.values()} <= read]
    graph.adaptations[:] = [a for a in graph.adaptations if a not in lost]
    for node in graph.nodes:
        if node.meta.get(ADAPTATION) in lost:
            del node.meta[ADAPTATION]
    return graph


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
            [-1 if isinstance(size, torch.SymInt) else size for size in _sizes(value)]
            for value in values
            if isinstance(value, torch.Tensor)
        ]
        if any(shape != shapes[0] for shape in shapes):
            sizes[name] = shapes
    return sizes


def _results(output: Any) -> list[Any]:
    results: Any = output.args[0]
    return list(cast("list[Any]", results)) if isinstance(results, (list, tuple)) else [results]


def _sizes(value: torch.Tensor) -> list[Any]:
    return list(value.shape)
