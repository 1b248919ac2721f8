"""Follows the tokens from the ids through a graph, and finds the operations where they meet outside attention."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from adaptc.ir.analysis.attention import Attention, Tokens, find_attentions, keys_of, operand, values_of
from adaptc.ir.analysis.dataflow import walk
from adaptc.ir.analysis.token_axes import Axes, MixesTokensError, TokenAxis, TokenMap, holds_tensor, with_past
from adaptc.ir.analysis.token_rules import SIZES_ALONE, axes_after
from adaptc.ir.nodes import is_tensor, memory_owner, operation, writes_in_place

Place = tuple[fx.Node, int | tuple[int, int]]
"""An argument of a node; a pair is a position in a list."""


@dataclass(frozen=True)
class Join:
    """Where the keys or the values of an attention are joined with those of the past.

    Attributes:
        attention: the number of the attention, in the order of execution.
        kind: `key` or `value`, or `cross.key` and `cross.value` of those that an encoder gives.
        tokens: the argument that is joined, and its axes.
    """

    attention: int
    kind: str
    tokens: Tokens

    @property
    def name(self) -> str:
        """The input, as in transformers' exports: `past_key_values.0.key`."""
        return f"past_key_values.{self.attention}.{self.kind}"

    @property
    def present(self) -> str:
        """The output that is the next call's input: `present.0.key`."""
        return f"present.{self.attention}.{self.kind}"

    @property
    def place(self) -> Place:
        """The argument that is joined."""
        return self.tokens.user, self.tokens.argument


def content_of(ids: fx.Node) -> set[fx.Node]:
    """All tensors that are computed from the token ids, through sizes not."""
    return set(walk([ids], lambda node: [u for u in node.users if holds_tensor(u) and _reads(u, node)]))


def _reads(user: fx.Node, node: fx.Node) -> bool:
    return operation(user) not in SIZES_ALONE or user.args[0] is not node


def find_joins(
    nodes: Iterable[fx.Node], content: set[fx.Node]
) -> tuple[list[Join], list[tuple[fx.Node, str]]]:
    """Where keys and values of the past are joined, for every attention of tokens with tokens.

    Returns:
        the joins, each place once; and (node, why), for attentions whose keys or values are not to be found.
    """
    joins: dict[Place, Join] = {}
    unclear: list[tuple[fx.Node, str]] = []
    attentions = [a for a in find_attentions(nodes) if a.mixed in content and a.key in content]
    for number, attention in enumerate(attentions):
        for kind, tokens in (("key", keys_of(attention)), ("value", values_of(attention))):
            if tokens is None:
                unclear.append((attention.mixed, f"the axes of the {kind}s of this attention are not told"))
            else:
                join = Join(number, kind, _behind_prefix(tokens, content))
                joins.setdefault(join.place, join)
    return list(joins.values()), unclear


def _behind_prefix(tokens: Tokens, content: set[fx.Node]) -> Tokens:
    """The tokens behind others that stand in front of them and are not computed from the ids, such as a prefix."""
    node = tokens.node
    while operation(node) == "cat":
        parts: Any = node.args[0]
        computed = [position for position, part in enumerate(parts) if part in content]
        if len(computed) != 1 or computed[0] != len(parts) - 1 or len(parts) < 2:
            break
        tokens = Tokens(node, (0, computed[0]), tokens.sequence, tokens.heads, tokens.features)
        node = tokens.node
    return tokens


def map_tokens(nodes: Iterable[fx.Node], ids: fx.Node, tokens: Any, joins: Iterable[Join]) -> TokenMap:
    """Follow the tokens.

    Args:
        nodes: of the graph, in the order of execution.
        ids: the input of token ids `(batch, tokens)`.
        tokens: their number, as a formula.
        joins: where the keys and values of the past will be.
    """
    axes: dict[fx.Node, Axes] = {ids: (TokenAxis(1),)}
    mixing: list[tuple[fx.Node, str]] = []
    lost: set[fx.Node] = set()
    joined: dict[fx.Node, list[fx.Node]] = {}
    for join in joins:
        joined.setdefault(join.tokens.user, []).append(operand(*join.place))
    for node in nodes:
        read = [n for n in node.all_input_nodes if n in axes or n in lost]
        if node.op != "call_function" or not holds_tensor(node) or not any(_reads(node, n) for n in read):
            continue
        if any(n in lost for n in read):
            lost.add(node)
            continue
        operands: Mapping[fx.Node, Axes] = {
            n: with_past(axes[n]) if n in joined.get(node, ()) else axes[n] for n in read
        }
        try:
            _check_write(node, axes)
            axes[node] = axes_after(node, operands, tokens)
        except MixesTokensError as error:
            mixing.append((node, str(error)))
            lost.add(node)
    return TokenMap(axes, mixing)


def _check_write(node: fx.Node, axes: Mapping[fx.Node, Axes]) -> None:
    if writes_in_place(node.target) and is_tensor(node.args[0]):
        written: Any = node.args[0]
        if written not in axes or memory_owner(written) not in axes:
            raise MixesTokensError("it writes into a tensor that is not computed from the token ids")


def attentions_of(nodes: Iterable[fx.Node], axes: Mapping[fx.Node, Axes]) -> list[Attention]:
    """The attentions of tokens with tokens."""
    return [a for a in find_attentions(nodes) if a.mixed in axes and a.key in axes]
