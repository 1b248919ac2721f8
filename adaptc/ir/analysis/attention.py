"""Attentions, read from the dataflow: one operation, or two products around a softmax."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx

from adaptc.ir.analysis.dataflow import activations_multiplied, downstream, upstream
from adaptc.ir.analysis.matmul import MATRIX_PRODUCTS
from adaptc.ir.nodes import keeps_shape, operation

FUSED = "scaled_dot_product_attention"
SAME = frozenset({"contiguous", "clone", "to", "alias", "slice"})
"""Operations that leave a key as it is; a slice does where it takes all."""


@dataclass(frozen=True)
class Attention:
    """`softmax(scores(q, k)) v`.

    Attributes:
        query, key, value: its operands, as the operations read them.
        scores: the product of query and key; softmax; mixed: the product with the values. All three are one node
            where attention is one operation.
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
        """What the scores are made of on the way to the softmax, beside the product itself; or the mask."""
        if not self.fused:
            return [self.softmax]
        return [mask for mask in self.mixed.args[3:4] if isinstance(mask, fx.Node)]


@dataclass(frozen=True)
class Tokens:
    """The keys or the values of an attention.

    Attributes:
        user, argument: where they are read; `node` is what is read there.
        sequence, heads, features: which axis is whose; without one for heads, these are in one with the batch.
    """

    user: fx.Node
    argument: int | tuple[int, int]
    sequence: int
    heads: int | None
    features: int

    @property
    def node(self) -> fx.Node:
        """The value."""
        return operand(self.user, self.argument)

    @property
    def size(self) -> int:
        """The number of features of a head."""
        return int(self.node.meta["val"].shape[self.features])

    def count(self, batches: Sequence[Any]) -> int | None:
        """The number of heads; None if it cannot be told, where they are in one axis with one of these batches."""
        shape = self.node.meta["val"].shape
        if self.heads is not None:
            return shape[self.heads] if isinstance(shape[self.heads], int) else None
        ratios = (_expression(shape[0]) / _expression(batch) for batch in batches)
        return next((int(ratio) for ratio in ratios if ratio.is_Integer), None)


def operand(node: fx.Node, argument: int | tuple[int, int]) -> Any:
    """An argument of a node; a pair is a place in a list."""
    if isinstance(argument, int):
        return node.args[argument]
    return node.args[argument[0]][argument[1]]  # type: ignore[index]


def replace_operand(node: fx.Node, argument: int | tuple[int, int], value: fx.Node) -> None:
    """Let a node read another value at one argument."""
    if isinstance(argument, int):
        node.update_arg(argument, value)
        return
    items = list(node.args[argument[0]])  # type: ignore[arg-type]
    items[argument[1]] = value
    node.update_arg(argument[0], items)


def _expression(size: Any) -> sympy.Expr:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def find_attentions(nodes: Iterable[fx.Node]) -> Iterator[Attention]:
    """Every attention of a graph, in the order of execution."""
    for node in nodes:
        if operation(node) == FUSED:
            query, key, value = node.args[:3]
            yield Attention(query, key, value, node, node, node)  # type: ignore[arg-type]
        elif operation(node) in ("softmax", "_softmax"):
            scores = next((n for n in upstream([node]) if activations_multiplied(n)), None)
            mixed = next((n for n in downstream(node) if activations_multiplied(n)), None)
            if scores is not None and mixed is not None:
                query, key = activations_multiplied(scores)
                yield Attention(query, key, activations_multiplied(mixed)[1], scores, node, mixed)


def keys_of(attention: Attention) -> Tokens | None:
    """Where the keys are, each head once; None if their axes cannot be told."""
    if attention.fused:
        return _unrepeated(_fused(attention.mixed, 1))
    return _unrepeated(_multiplied(attention.scores, turned=True))


def values_of(attention: Attention) -> Tokens | None:
    """Where the values are, each head once; None if their axes cannot be told."""
    if attention.fused:
        return _unrepeated(_fused(attention.mixed, 2))
    return _unrepeated(_multiplied(attention.mixed, turned=False))


def _fused(node: fx.Node, argument: int) -> Tokens | None:
    rank = operand(node, argument).meta["val"].dim()
    return Tokens(node, argument, rank - 2, rank - 3 if rank > 3 else None, rank - 1) if rank > 2 else None


def _multiplied(node: fx.Node, turned: bool) -> Tokens | None:
    """The second operand of a product: `(..., features, tokens)` if turned, else `(..., tokens, features)`."""
    name = operation(node)
    if name == "einsum":
        return _einsum(node, turned)
    argument = MATRIX_PRODUCTS[name].operands[1]
    rank = operand(node, argument).meta["val"].dim()
    sequence, features = (rank - 1, rank - 2) if turned else (rank - 2, rank - 1)
    return (
        Tokens(node, argument, sequence, rank - 3 if rank > 3 else None, features) if rank in (3, 4) else None
    )


def _einsum(node: fx.Node, keys: bool) -> Tokens | None:
    """Letters: of keys the features are summed over, of values the tokens are."""
    left, _, result = str(node.args[0]).replace(" ", "").partition("->")
    query, own = left.split(",")
    summed = [c for c in own if c in query and c not in result]
    alone = [c for c in own if c not in query and c in result]
    shared = [c for c in own if c in query and c in result]
    if len(summed) != 1 or len(alone) != 1 or not 1 <= len(shared) <= 2:
        return None
    sequence, features = (alone[0], summed[0]) if keys else (summed[0], alone[0])
    heads = own.index(shared[1]) if len(shared) == 2 else None
    return Tokens(node, (1, 1), own.index(sequence), heads, own.index(features))


def _unrepeated(found: Tokens | None) -> Tokens | None:
    """The same before views that turn axes, and before a head of grouped queries is repeated for each of them."""
    while found is not None and (before := _before(found)) is not None:
        found = before
    return found


def _before(tokens: Tokens) -> Tokens | None:
    """The same one view earlier; None where there is none that can be seen through."""
    node, args = tokens.node, tokens.node.args
    name = operation(node)
    if name in SAME and keeps_shape(node):
        return replace(tokens, user=node, argument=0)
    if name in ("transpose", "mT") and tokens.heads is not None:
        rank = node.meta["val"].dim()
        one, other = (args[1] % rank, args[2] % rank) if name == "transpose" else (rank - 2, rank - 1)  # type: ignore[operator]
        if tokens.heads in (one, other):  # from here on heads and tokens are rows of a layer's output
            return None
        turned = {one: other, other: one}
        places = [turned.get(axis, axis) for axis in (tokens.sequence, tokens.heads, tokens.features)]
        return Tokens(node, 0, *places)
    if name in ("reshape", "view", "flatten") and tokens.heads == 1:
        return _before_repeating(tokens, node)
    if name == "repeat_interleave" and args[2:3] == (tokens.heads,):
        return replace(tokens, user=node, argument=0)
    return None


def _before_repeating(tokens: Tokens, node: fx.Node) -> Tokens | None:
    """`(batch, heads, times, tokens, features)` expanded and joined: the keys before each was repeated."""
    expanded: Any = node.args[0]
    while operation(expanded) in SAME:
        expanded = expanded.args[0]
    if operation(expanded) != "expand" or expanded.meta["val"].dim() != node.meta["val"].dim() + 1:
        return None
    added: Any = expanded.args[0]
    while operation(added) in SAME and keeps_shape(added):
        added = added.args[0]
    if operation(added) != "unsqueeze" or added.args[1] != 2 or added.args[0].meta["val"].dim() != 4:
        return None
    return replace(tokens, user=added, argument=0)
