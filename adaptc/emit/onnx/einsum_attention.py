"""Attention that is written with einsum and where, spelled as one with matmul and masked_fill is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from adaptc.ir.analysis.attention import Attention
from adaptc.ir.analysis.dataflow import VIEWS, unviewed
from adaptc.ir.analysis.matrix_products import product_terms
from adaptc.ir.graph import Graph
from adaptc.ir.nodes import node_arg, operation
from adaptc.weights import Held

aten = torch.ops.aten
COPIES = frozenset({"detach", "detach_", "lift_fresh_copy"})
"""Operations between a constant of the code and what reads it."""
EVERYWHERE: dict[Any, int] = {aten.full.default: 1, aten.full_like.default: 1, aten.scalar_tensor.default: 0}
"""An operation that gives one number everywhere -> the position of that."""


def spelled_with_matmul(graph: Graph, attention: Attention) -> bool:
    """Spell an attention's products as matmul of `(batch, heads, tokens, features)`, and its fills as masked_fill.

    Returns:
        whether anything was changed: only what computes the same is.
    """
    choices = _choices(attention)
    products = [_scores(attention), _mixed(attention)]
    for node, product in zip((attention.scores, attention.mixed), products, strict=True):
        if product is not None:
            _put_matmul(graph, node, product)
    fills = [_put_masked_fill(graph, node) for node in choices]
    return any(fills) or products != [None, None]


@dataclass(frozen=True)
class _Product:
    """The order of the axes of an einsum that is a product of heads.

    Attributes:
        left: the axes of its first operand in the order `(batch, heads, rows, inner)`.
        right: those of its second operand, likewise `(batch, heads, inner, columns)`.
        result: those of `(batch, heads, rows, columns)` in the order of the result.
    """

    left: Sequence[int]
    right: Sequence[int]
    result: Sequence[int]


def _letters(node: fx.Node) -> tuple[str, str, str] | None:
    """The letters of the operands and the result of an einsum, of four axes each; None where any are repeated."""
    terms = product_terms(node) if operation(node) == "einsum" else None
    if terms is None or len(terms[0]) != 2:
        return None
    ((first, left), (second, right)), result = terms
    plain = all(len(letters) == len(set(letters)) == 4 for letters in (left, right, result))
    sizes = dict(zip(left, first.meta["val"].shape, strict=plain))
    repeated = any(  # an einsum repeats an axis of one
        isinstance(size, int) and isinstance(sizes.get(letter), int) and size != sizes[letter]
        for letter, size in zip(right, second.meta["val"].shape, strict=plain)
    )
    return (left, right, result) if plain and not repeated else None


def _scores(attention: Attention) -> _Product | None:
    """The product of queries and keys, `(batch, heads, queries, keys)`; None if it is no such einsum."""
    letters = _letters(attention.scores)
    if letters is None:
        return None
    query, key, result = letters
    batch, heads, rows, columns = result
    inner = set(query) & set(key) - set(result)
    if len(inner) != 1 or rows in key or columns in query:
        return None
    (summed,) = inner
    return _product(query, key, result, batch + heads + rows + summed, batch + heads + summed + columns)


def _mixed(attention: Attention) -> _Product | None:
    """The product of shares `(batch, heads, queries, keys)` and values; None if it is no such einsum."""
    letters = _letters(attention.mixed)
    if letters is None:
        return None
    shares, value, result = letters
    batch, heads, rows, summed = shares
    columns = set(value) - set(shares)
    if len(columns) != 1 or summed in result or rows in value:
        return None
    (feature,) = columns
    return _product(shares, value, result, shares, batch + heads + summed + feature)


def _product(left: str, right: str, result: str, wanted: str, other: str) -> _Product | None:
    """The orders of the axes by their letters; None if an operand or the result has other ones."""
    straight = wanted[:3] + other[3]
    if set(left) != set(wanted) or set(right) != set(other) or set(result) != set(straight):
        return None
    return _Product(
        [left.index(c) for c in wanted], [right.index(c) for c in other], [straight.index(c) for c in result]
    )


def _put_matmul(graph: Graph, node: fx.Node, product: _Product) -> None:
    """Put a matmul in the place of an einsum."""
    operands: Any = node.args[1]
    with graph.module.graph.inserting_before(node):
        left = _ordered(graph, operands[0], product.left)
        right = _ordered(graph, operands[1], product.right)
        result = _ordered(graph, graph.call(aten.matmul.default, left, right, like=node), product.result)
    node.replace_all_uses_with(result)
    graph.module.graph.erase_node(node)


def _ordered(graph: Graph, node: fx.Node, order: Sequence[int]) -> fx.Node:
    """A value with its axes in an order; that of which it is a permutation itself where the two cancel."""
    if list(order) == [0, 1, 2, 3]:
        return node
    if operation(node) == "permute":
        axes: Any = node.args[1]
        if [axes[axis] for axis in order] == [0, 1, 2, 3]:
            return node_arg(node, 0)
    for pair in ((1, 2), (2, 3)):
        if list(order) == [pair[::-1][pair.index(a)] if a in pair else a for a in range(4)]:
            return graph.call(aten.transpose.int, node, *pair, like=node)
    return graph.call(aten.permute.default, node, list(order), like=node)


def _choices(attention: Attention) -> list[fx.Node]:
    """The choices between the scores and something else, in front of the softmax."""
    choices: list[fx.Node] = []
    node: Any = attention.softmax.args[0]
    while isinstance(node, fx.Node) and node is not attention.scores and node.op == "call_function":
        chosen = operation(node) == "where"
        choices += [node] * chosen
        among: Sequence[Any] = node.args[1:] if chosen else node.args[:1]
        node = next((n for n in among if isinstance(n, fx.Node) and n.meta["val"].dim() == 4), None)
    return choices


def _put_masked_fill(graph: Graph, node: fx.Node) -> bool:
    """Put a fill in the place of a choice between the scores and a number."""
    condition, first, second = node.args
    numbers = _number(graph, first), _number(graph, second)
    if (numbers[0] is None) == (numbers[1] is None) or not isinstance(condition, fx.Node):
        return False
    where_false = numbers[1] is not None
    scores: Any = first if where_false else second
    before, value = scores.meta["val"], node.meta["val"]
    if str(before.shape) != str(value.shape) or before.dtype != value.dtype:
        return False
    with graph.module.graph.inserting_before(node):
        hides = graph.call(aten.logical_not.default, condition, like=node) if where_false else condition
        filled = graph.call(aten.masked_fill.Scalar, scores, hides, numbers[where_false], like=node)
    node.replace_all_uses_with(filled)
    graph.module.graph.erase_node(node)
    return True


def _number(graph: Graph, value: Any) -> float | None:
    """The number that a value is everywhere; None if it is none, or is not known."""
    if not isinstance(value, fx.Node):
        return float(value)
    source = unviewed(value, VIEWS | COPIES)
    if source.op == "get_attr":
        weight = graph.weights.get(str(source.target))
        return float(weight.load()) if isinstance(weight, Held) and not weight.shape else None
    number = source.args[EVERYWHERE[source.target]] if source.target in EVERYWHERE else None
    return float(number) if isinstance(number, (int, float)) else None
