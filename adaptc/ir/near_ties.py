"""Labels that rounding decides: whole numbers and booleans that a model makes of floats, such as an argmax.

An output is followed back to the operation that makes whole numbers of floats. Another label is as good where the
floats behind it are as large, to within the tolerance, as those behind the graph's own.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import fx
from torch.utils import _pytree as pytree

from adaptc.ir.graph import Graph
from adaptc.ir.interpreter import Batch, Batches, Outcome, Run, observed
from adaptc.ir.nodes import is_tensor, map_operands, returns_operand
from adaptc.ir.tie_breaks import INDICES, PAIRS, as_good, largest

aten = torch.ops.aten
COMPARISONS = frozenset(
    getattr(getattr(aten, name), overload)
    for name in ("gt", "ge", "lt", "le", "eq", "ne")
    for overload in ("Scalar", "Tensor")
)
"""Operations that compare two values."""
ROUNDINGS: Mapping[Any, float] = {
    aten.round.default: 0.5,
    aten.floor.default: 0.0,
    aten.ceil.default: 0.0,
    aten.trunc.default: 0.0,
}
"""Operations that round to whole numbers -> where between two of them the result changes."""
CASTS = frozenset({aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default})
"""Operations that change a dtype; from floats to whole numbers they cut the fraction."""
ELEMENTWISE = CASTS | {aten.clamp.default, aten.clone.default}
"""Operations whose every element is made of the one at the same place."""
COPIES = frozenset({aten.flip.default, aten.roll.default, aten.repeat.default, aten.index_select.default})
"""Operations that only move elements and are no views."""


def near_ties(
    graph: Graph,
    batch: Batch,
    output: int,
    given: Sequence[torch.Tensor],
    near: float,
    least: torch.dtype | None,
) -> torch.Tensor:
    """Where labels are as good as a graph's own.

    Args:
        graph: the graph.
        batch: its inputs.
        output: the position of the output among those that are tensors.
        given: what other computations gave for that output.
        near: how far apart two floats may be to be equally good, as a share of the largest.
        least: the dtype that the graph computes in at least.

    Returns:
        True where all of `given` are as good, in their shape; all False where no float decides.
    """
    nowhere = torch.zeros_like(given[0], dtype=torch.bool)
    path = _path(_outputs(graph)[output])
    if path is None:
        return nowhere
    chooser, *moves = path
    wanted = {chooser, *(_pair(chooser) or chooser).all_input_nodes}
    wanted |= {operand for node in moves for operand in node.all_input_nodes}
    values: dict[fx.Node, Any] = {
        node: graph.weights[str(node.target)].load() for node in wanted if node.op == "get_attr"
    }

    def keep(node: fx.Node, value: Any) -> None:
        if node in wanted:
            values[node] = value

    observed(graph, [batch], keep, least)
    if wanted - values.keys():
        return nowhere  # the graph does not run on this batch
    chosen = cast(torch.Tensor, values[chooser])
    places = torch.arange(chosen.numel()).reshape(chosen.shape)
    for node in moves:
        if node.target not in ELEMENTWISE:
            args, kwargs = map_operands(node, values.__getitem__)
            places = cast(Callable[..., torch.Tensor], node.target)(places, *args[1:], **kwargs)
    good = ~nowhere
    for labels in given:
        others = chosen.flatten().clone()
        others[places.flatten()] = labels.flatten().to(chosen.dtype)
        good &= _as_good(chooser, values, chosen, others.reshape(chosen.shape), near).flatten()[places]
    return good


def floats_behind_labels(graph: Graph, batches: Batches, least: torch.dtype | None) -> Run:
    """A run whose outputs are the floats that a graph makes labels of, one tensor for each output that is a label."""
    paths = [_path(node) for node in _outputs(graph) if not node.meta["val"].is_floating_point()]
    wanted = [(_pair(path[0]) or path[0]).all_input_nodes[0] for path in paths if path is not None]
    values: dict[fx.Node, list[torch.Tensor]] = {node: [] for node in wanted}
    outcomes: dict[str, Outcome] = {}
    for label, batch in batches.items() if wanted else ():

        def keep(node: fx.Node, value: Any) -> None:
            if node in values:
                values[node].append(value)

        (outcome,) = observed(graph, [batch], keep, least)
        outcomes[label] = outcome if isinstance(outcome, Exception) else [values[node][-1] for node in wanted]
    return Run(batches if wanted else {}, outcomes)


def _outputs(graph: Graph) -> list[fx.Node]:
    """The nodes of the outputs that are tensors."""
    result = next(node for node in graph.nodes if node.op == "output")
    return [node for node in pytree.tree_leaves(result.args) if is_tensor(node)]


def _path(node: fx.Node) -> list[fx.Node] | None:
    """The nodes from the one that makes labels of floats to this one; None where there is none."""
    backwards: list[fx.Node] = []
    while not _chooses(node):
        if not (node.target in ELEMENTWISE | COPIES or returns_operand(node.target)):
            return None
        backwards.append(node)
        node = node.all_input_nodes[0]
    return [node, *backwards[::-1]]


def _chooses(node: fx.Node) -> bool:
    """Whether a node makes labels of floats: indices, comparisons, whole numbers."""
    if node.target in INDICES or _pair(node) is not None:
        return True
    operand = node.all_input_nodes[0].meta.get("val") if node.all_input_nodes else None
    if not isinstance(operand, torch.Tensor) or not operand.is_floating_point():
        return False
    cuts = node.target in CASTS and not node.meta["val"].is_floating_point()
    return (
        node.target in COMPARISONS
        or node.target in ROUNDINGS
        or (cuts and not _whole(node.all_input_nodes[0]))
    )


def _whole(node: fx.Node) -> bool:
    """Whether the floats of a node were rounded to whole numbers."""
    while node.target in ELEMENTWISE | COPIES or returns_operand(node.target):
        node = node.all_input_nodes[0]
    return node.target in ROUNDINGS


def _pair(node: fx.Node) -> fx.Node | None:
    """The operation whose second result, the indices, a node is; None for any other node."""
    pair = node.args[0] if node.target is operator.getitem and node.args[1] == 1 else None
    return pair if isinstance(pair, fx.Node) and pair.target in PAIRS else None


def _as_good(
    node: fx.Node, values: Mapping[fx.Node, Any], chosen: torch.Tensor, others: torch.Tensor, near: float
) -> torch.Tensor:
    """Where other labels of a node are as good as those that it chose."""
    indexer = _pair(node) or node
    if indexer.target in PAIRS | INDICES:
        return as_good(indexer, values[indexer.all_input_nodes[0]], chosen, others, near)
    args, _ = map_operands(node, values.__getitem__)
    x = args[0].double()
    if node.target in COMPARISONS:
        y = torch.as_tensor(args[1], dtype=torch.float64)
        return ((x - y).abs() <= near * max(largest(x), largest(y))).expand(chosen.shape)
    edge = ROUNDINGS.get(node.target, 0.0)
    distance = (x - edge - (x - edge).round()).abs()
    return ((chosen.double() - others.double()).abs() <= 1) & (distance <= near * largest(x))
