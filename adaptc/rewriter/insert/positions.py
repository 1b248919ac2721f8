"""Positions that a model counts for its tokens: found in the graph, and moved."""

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
Place = tuple[fx.Node, int | tuple[int, int]]
"""A node, and the argument where it reads positions."""
LOOKUPS = frozenset({"embedding", "index", "index_select"})


def move_positions(graph: Graph, attentions: Sequence[Attention], count: int) -> None:
    """Let the model count its tokens from `count` on, where these attentions are the first to see them.

    Two ways of counting are known: angles of rotary embeddings, and positions that a table is looked up at. A table
    that is added whole, or has no row left, stays where it is.
    """
    nodes = list(graph.nodes)
    moved: dict[fx.Node, fx.Node] = {}
    for user, argument in dict.fromkeys([*_rotary(attentions), *_looked_up(graph, nodes, attentions, count)]):
        positions = operand(user, argument)
        if positions not in moved:
            with graph.module.graph.inserting_after(positions):
                moved[positions] = graph.call(aten.add.Tensor, positions, count, like=user)
        replace_operand(user, argument, moved[positions])


def _rotary(attentions: Iterable[Attention]) -> Iterator[Place]:
    """Where frequencies are multiplied with positions, or a table of angles is read, on the way to these attentions."""
    for attention in attentions:
        for node in upstream([attention.query, attention.key]):
            if operation(node) in ("cos", "sin"):
                yield from _angles(node)
            elif operation(node) in LOOKUPS and is_weight(node.args[0]):  # type: ignore[arg-type]
                yield node, _indices(node)


def _angles(node: fx.Node) -> Iterator[Place]:
    def active(node: fx.Node) -> list[fx.Node]:
        return [n for n in node.all_input_nodes if unviewed(n).op != "get_attr"]

    def multiplies(node: fx.Node) -> bool:
        return operation(node) in ("mul", "matmul", "bmm", "einsum", "outer") and len(active(node)) == 1

    for current in filter(multiplies, walk([node], active, multiplies)):
        places = [0, 1, (1, 0), (1, 1)]
        yield current, next(p for p in places if _at(current, p) is active(current)[0])


def _at(node: fx.Node, place: Any) -> Any:
    found = node.args[place[0]] if isinstance(place, tuple) else node.args[place]
    return found[place[1]] if isinstance(place, tuple) and isinstance(found, (list, tuple)) else found


def _looked_up(
    graph: Graph, nodes: Sequence[fx.Node], attentions: Sequence[Attention], count: int
) -> Iterator[Place]:
    """Where the rows of a table of positions are read, for tokens that one of these attentions sees first."""
    every = list(find_attentions(nodes))
    masks = {node for attention in every for node in upstream(attention.biases)}
    order = {node: index for index, node in enumerate(nodes)}
    wanted = {attention.mixed for attention in attentions}
    for node in nodes:
        if operation(node) not in LOOKUPS or node in masks or not is_weight(node.args[0]):  # type: ignore[arg-type]
            continue
        place = _indices(node)
        positions = operand(node, place)
        if not isinstance(positions, fx.Node) or not _counts(graph, positions):
            continue
        first = next((a.mixed for a in every if _reaches(node, a.mixed, order)), None)
        if first in wanted and _has_room(node, positions, count):
            yield node, place


def _indices(node: fx.Node) -> int | tuple[int, int]:
    return {"embedding": 1, "index_select": 2}.get(operation(node), (1, 0))


def _counts(graph: Graph, positions: fx.Node) -> bool:
    """Whether a value counts tokens: 0, 1, 2, … by their place, or by a mask summed up; or an input of that name."""

    def counted_from(node: fx.Node) -> list[fx.Node]:
        inner = [node.args[0]] if operation(node) in ("gather", *LOOKUPS) else node.all_input_nodes
        return [n for n in inner if isinstance(n, fx.Node) and isinstance(n.meta.get("val"), torch.Tensor)]

    for node in walk([positions], counted_from):
        name = operation(node)
        if name in ("arange", "cumsum") or (node.op == "placeholder" and "position" in str(node.target)):
            return True
        if node.op == "get_attr" and not node.meta["val"].dtype.is_floating_point:
            stored = graph.weights[str(node.target)].load().flatten()
            if len(stored) > 1 and bool((stored.diff() == 1).all()):
                return True
    return False


def _has_room(node: fx.Node, positions: fx.Node, count: int) -> bool:
    """Whether a table has rows beyond those of a sequence of fixed length."""
    rows, length = node.args[0].meta["val"].shape[0], positions.meta["val"].shape[-1]  # type: ignore[union-attr]
    return not isinstance(length, int) or length + count <= rows


def _reaches(start: fx.Node, end: fx.Node, order: dict[fx.Node, int]) -> bool:
    return end in walk([start], lambda node: [user for user in node.users if order[user] <= order[end]])
