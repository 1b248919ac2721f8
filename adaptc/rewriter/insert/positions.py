"""Positions that a model counts for its tokens: found in the graph, and shifted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from adaptc.ir.analysis.attention import Attention, find_attentions, operand, replace_operand
from adaptc.ir.analysis.dataflow import is_weight, unviewed, upstream, walk
from adaptc.ir.graph import Graph
from adaptc.ir.nodes import operation

aten = torch.ops.aten
Argument = int | tuple[int, int]
"""Which argument of a node: its index, or inside a list of nodes (the list's index, the index in it)."""
PositionUse = tuple[fx.Node, Argument]
"""A node that reads positions, and the argument where it reads them."""
LOOKUPS = frozenset({"embedding", "index", "index_select"})
"""Operations that look up rows of a table."""


def move_positions(graph: Graph, attentions: Sequence[Attention], count: int | fx.Node) -> None:
    """Let the model count the tokens that these attentions see from `count` on.

    Two uses of positions are known: angles of rotary embeddings, and rows of a table that are looked up. A table that
    is added as a whole, or has no further row, is left as it is.
    """
    nodes = list(graph.nodes)
    shifted: dict[fx.Node, fx.Node] = {}
    for user, argument in dict.fromkeys([*_rotary(attentions), *_looked_up(graph, nodes, attentions, count)]):
        positions = operand(user, argument)
        if positions not in shifted:
            with graph.module.graph.inserting_after(behind(positions, count)):
                shifted[positions] = graph.call(aten.add.Tensor, positions, count, like=user)
        replace_operand(user, argument, shifted[positions])


def behind(node: fx.Node, count: int | fx.Node) -> fx.Node:
    """The later one of a node and a count, which stands in front of all other operations."""
    return count if isinstance(count, fx.Node) and node.op != "call_function" else node


def _rotary(attentions: Iterable[Attention]) -> Iterator[PositionUse]:
    """Where frequencies are multiplied by positions, or a table of angles is read, upstream of these attentions."""
    for attention in attentions:
        for node in upstream([attention.query, attention.key]):
            if operation(node) in ("cos", "sin"):
                yield from _angles(node)
            elif _reads_table(node):
                yield node, _indices(node)


def _angles(node: fx.Node) -> Iterator[PositionUse]:
    """Where the angles of a cosine or sine are multiplied: frequencies by positions."""

    def active(node: fx.Node) -> list[fx.Node]:
        return [n for n in node.all_input_nodes if unviewed(n).op != "get_attr"]

    def multiplies(node: fx.Node) -> bool:
        return operation(node) in ("mul", "matmul", "bmm", "einsum", "outer") and len(active(node)) == 1

    for current in filter(multiplies, walk([node], active, multiplies)):
        arguments: list[Argument] = [0, 1, (1, 0), (1, 1)]
        yield current, next(a for a in arguments if _operand_at(current, a) is active(current)[0])


def _operand_at(node: fx.Node, argument: Argument) -> Any:
    """An operand of a node; that which is no list of nodes is taken as it is."""
    first, second = argument if isinstance(argument, tuple) else (argument, None)
    value = node.args[first]
    return value[second] if second is not None and isinstance(value, (list, tuple)) else value


def _reads_table(node: fx.Node) -> bool:
    """Whether a node looks up rows of a weight."""
    table = node.args[0] if operation(node) in LOOKUPS else None
    return isinstance(table, fx.Node) and is_weight(table)


def _looked_up(
    graph: Graph, nodes: Sequence[fx.Node], attentions: Sequence[Attention], count: int | fx.Node
) -> Iterator[PositionUse]:
    """Where rows of a table of positions are looked up, for tokens that one of these attentions is the first to see."""
    every = list(find_attentions(nodes))
    masks = {node for attention in every for node in upstream(attention.biases)}
    order = {node: index for index, node in enumerate(nodes)}
    wanted = {attention.mixed for attention in attentions}
    for node in nodes:
        if node in masks or not _reads_table(node):
            continue
        argument = _indices(node)
        positions = operand(node, argument)
        if not isinstance(positions, fx.Node) or not _counts(graph, positions):
            continue
        first = next((a.mixed for a in every if _reaches(node, a.mixed, order)), None)
        if first in wanted and _has_room(node, positions, count):
            yield node, argument


def _indices(node: fx.Node) -> Argument:
    """The argument of a lookup that says which rows."""
    return {"embedding": 1, "index_select": 2}.get(operation(node), (1, 0))


def _counts(graph: Graph, positions: fx.Node) -> bool:
    """Whether a value counts tokens: it comes from 0, 1, 2, …, from the running sum of a mask, or from an input of
    positions.
    """

    def counted_from(node: fx.Node) -> list[fx.Node]:
        inner = [node.args[0]] if operation(node) in ("gather", *LOOKUPS) else node.all_input_nodes
        return [n for n in inner if isinstance(n, fx.Node) and isinstance(n.meta.get("val"), torch.Tensor)]

    for node in walk([positions], counted_from):
        name = operation(node)
        if name in ("arange", "cumsum") or (node.op == "placeholder" and "position" in str(node.target)):
            return True
        if node.op == "get_attr" and not node.meta["val"].dtype.is_floating_point:
            stored = graph.weights[str(node.target)].load().flatten()
            if len(stored) > 1 and bool(torch.all(stored.diff() == 1)):
                return True
    return False


def _has_room(node: fx.Node, positions: fx.Node, count: int | fx.Node) -> bool:
    """Whether a table has `count` rows more than a sequence of fixed length reads; any, where the count is a node."""
    table: Any = node.args[0]
    rows, length = table.meta["val"].shape[0], positions.meta["val"].shape[-1]
    more = count if isinstance(count, int) else 1
    return not isinstance(length, int) or length + more <= rows


def _reaches(start: fx.Node, end: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Whether `end` is computed from `start`."""
    return end in walk([start], lambda node: [user for user in node.users if order[user] <= order[end]])
