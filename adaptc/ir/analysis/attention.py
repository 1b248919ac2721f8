"""Attentions, read from the dataflow: one operation, or two matrix products around a softmax."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import fx

from adaptc.ir.analysis.dataflow import activations_multiplied, downstream, upstream
from adaptc.ir.analysis.matrix_products import MATRIX_PRODUCTS
from adaptc.ir.nodes import RESHAPES, keeps_shape, list_arg, node_arg, operation, size_expression

FUSED = "scaled_dot_product_attention"
SAME = frozenset({"contiguous", "clone", "to", "alias", "slice"})
"""Operations that leave a value as it is; a slice does if it takes all."""


@dataclass(frozen=True)
class Attention:
    """`softmax(scores(q, k)) v`.

    Attributes:
        query, key, value: its operands, as the operations read them.
        scores: the matrix product of query and key.
        softmax: the softmax of the scores.
        mixed: the matrix product with the values. If attention is one operation, `scores`, `softmax` and `mixed` are
            all that node.
    """

    query: fx.Node
    key: fx.Node
    value: fx.Node
    scores: fx.Node
    softmax: fx.Node
    mixed: fx.Node

    @property
    def fused(self) -> bool:
        """Whether it is one operation."""
        return self.scores is self.mixed

    @property
    def biases(self) -> list[fx.Node]:
        """The nodes through which a mask or bias enters: the softmax, or the mask argument of the one operation."""
        if not self.fused:
            return [self.softmax]
        return [mask for mask in self.mixed.args[3:4] if isinstance(mask, fx.Node)]


@dataclass(frozen=True)
class Tokens:
    """The keys or the values of an attention.

    Attributes:
        user: the node that reads them.
        argument: the position of the argument; a pair is a position in a list.
        sequence: the axis of the tokens.
        heads: the axis of the heads; None if they share an axis with the batch.
        features: the axis of the features of a head.
    """

    user: fx.Node
    argument: int | tuple[int, int]
    sequence: int
    heads: int | None
    features: int

    @property
    def node(self) -> fx.Node:
        """The node that is read."""
        return operand(self.user, self.argument)

    @property
    def size(self) -> int:
        """The number of features of a head."""
        return int(self.node.meta["val"].shape[self.features])

    def count(self, batches: Sequence[object]) -> int | None:
        """The number of heads; None if unknown.

        Args:
            batches: sizes that the batch can have, in case the heads share its axis.
        """
        shape = self.node.meta["val"].shape
        if self.heads is not None:
            return shape[self.heads] if isinstance(shape[self.heads], int) else None
        ratios = (size_expression(shape[0]) / size_expression(batch) for batch in batches)
        return next((int(ratio) for ratio in ratios if ratio.is_Integer), None)


def operand(node: fx.Node, argument: int | tuple[int, int]) -> Any:
    """An argument of a node; a pair is a position in a list."""
    if isinstance(argument, int):
        return node.args[argument]
    return list_arg(node, argument[0])[argument[1]]


def replace_operand(node: fx.Node, argument: int | tuple[int, int], value: fx.Node) -> None:
    """Let a node read another value at one argument; a pair is a position in a list."""
    if isinstance(argument, int):
        node.update_arg(argument, value)
        return
    items = list_arg(node, argument[0])
    items[argument[1]] = value
    node.update_arg(argument[0], items)


def find_attentions(nodes: Iterable[fx.Node]) -> Iterator[Attention]:
    """Every attention of a graph, in the order of execution."""
    for node in nodes:
        if operation(node) == FUSED:
            query, key, value = (node_arg(node, position) for position in range(3))
            yield Attention(query, key, value, node, node, node)
        elif operation(node) in ("softmax", "_softmax"):
            scores = next((n for n in upstream([node]) if activations_multiplied(n)), None)
            mixed = next((n for n in downstream(node) if activations_multiplied(n)), None)
            if scores is not None and mixed is not None:
                query, key = activations_multiplied(scores)
                yield Attention(query, key, activations_multiplied(mixed)[1], scores, node, mixed)


def keys_of(attention: Attention) -> Tokens | None:
    """Where the keys are read, before heads are repeated for grouped queries; None if their axes are unknown."""
    if attention.fused:
        return _unrepeated(_fused(attention.mixed, 1))
    return _unrepeated(_multiplied(attention.scores, flipped=True))


def values_of(attention: Attention) -> Tokens | None:
    """Where the values are read, before heads are repeated for grouped queries; None if their axes are unknown."""
    if attention.fused:
        return _unrepeated(_fused(attention.mixed, 2))
    return _unrepeated(_multiplied(attention.mixed, flipped=False))


def _fused(node: fx.Node, argument: int) -> Tokens | None:
    """An operand `(..., tokens, features)` of an attention that is one operation."""
    rank = operand(node, argument).meta["val"].dim()
    return Tokens(node, argument, rank - 2, rank - 3 if rank > 3 else None, rank - 1) if rank > 2 else None


def _multiplied(node: fx.Node, flipped: bool) -> Tokens | None:
    """The second operand of a matrix product: `(..., tokens, features)`, or `(..., features, tokens)` if flipped."""
    name = operation(node)
    if name == "einsum":
        return _einsum(node, flipped)
    argument = MATRIX_PRODUCTS[name].operands[1]
    rank = operand(node, argument).meta["val"].dim()
    sequence, features = (rank - 1, rank - 2) if flipped else (rank - 2, rank - 1)
    return (
        Tokens(node, argument, sequence, rank - 3 if rank > 3 else None, features) if rank in (3, 4) else None
    )


def _einsum(node: fx.Node, keys: bool) -> Tokens | None:
    """The second operand of an einsum, whose letters tell the axes.

    An einsum with keys sums over their features, one with values over their tokens.
    """
    operands, _, result = str(node.args[0]).replace(" ", "").partition("->")
    first, letters = operands.split(",")
    summed = [c for c in letters if c in first and c not in result]
    alone = [c for c in letters if c not in first and c in result]
    shared = [c for c in letters if c in first and c in result]
    if len(summed) != 1 or len(alone) != 1 or not 1 <= len(shared) <= 2:
        return None
    sequence, features = (alone[0], summed[0]) if keys else (summed[0], alone[0])
    heads = letters.index(shared[1]) if len(shared) == 2 else None
    return Tokens(node, (1, 1), letters.index(sequence), heads, letters.index(features))


def _unrepeated(tokens: Tokens | None) -> Tokens | None:
    """The tokens as they are upstream of views, and of the repetition of heads for grouped queries."""
    while tokens is not None and (source := _upstream(tokens)) is not None:
        tokens = source
    return tokens


def _upstream(tokens: Tokens) -> Tokens | None:
    """The tokens as they are upstream of the view that gives them; None if no such view does."""
    node, args = tokens.node, cast(tuple[Any, ...], tokens.node.args)
    name = operation(node)
    if name in SAME and keeps_shape(node):
        return replace(tokens, user=node, argument=0)
    if name in ("transpose", "mT") and tokens.heads is not None:
        rank = node.meta["val"].dim()
        first, second = (args[1] % rank, args[2] % rank) if name == "transpose" else (rank - 2, rank - 1)
        if tokens.heads in (first, second):  # upstream of it is a layer's output, whose rows are tokens
            return None
        swapped = {first: second, second: first}
        sequence, heads, features = (
            swapped.get(axis, axis) for axis in (tokens.sequence, tokens.heads, tokens.features)
        )
        return Tokens(node, 0, sequence, heads, features)
    if name in {*RESHAPES, "flatten"} and tokens.heads == 1:
        return _upstream_of_repeat(tokens, node)
    if name == "repeat_interleave" and args[2:3] == (tokens.heads,):
        return replace(tokens, user=node, argument=0)
    return None


def _upstream_of_repeat(tokens: Tokens, node: fx.Node) -> Tokens | None:
    """The tokens before an unsqueeze, an expand and this reshape repeat each head; None if the node does not end these.

    The expanded value is `(batch, heads, repeats, tokens, features)`.
    """
    expanded: Any = node.args[0]
    while operation(expanded) in SAME:
        expanded = expanded.args[0]
    if operation(expanded) != "expand" or expanded.meta["val"].dim() != node.meta["val"].dim() + 1:
        return None
    unsqueezed: Any = expanded.args[0]
    while operation(unsqueezed) in SAME and keeps_shape(unsqueezed):
        unsqueezed = unsqueezed.args[0]
    if operation(unsqueezed) != "unsqueeze" or unsqueezed.args[1] != 2:
        return None
    if unsqueezed.args[0].meta["val"].dim() != 4:
        return None
    return replace(tokens, user=unsqueezed, argument=0)
