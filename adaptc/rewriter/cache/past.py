"""The keys and values of the past: inputs of a graph, joined with those of the new tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic

from adaptc.inputs import InputSpec
from adaptc.ir.analysis.attention import Tokens
from adaptc.ir.analysis.token_map import Join
from adaptc.ir.graph import Graph

aten = torch.ops.aten
PAST = "past"
"""The name of the dimension of the tokens in the past."""
TOTAL = "total"
"""The name of the dimension of all tokens, past and new."""


@dataclass(frozen=True)
class PastInput:
    """The keys or the values of one attention.

    Attributes:
        join: where they are joined.
        node: the input, `(batch, heads, past, size)`.
        heads: how many heads it has.
    """

    join: Join
    node: fx.Node
    heads: int

    @property
    def name(self) -> str:
        """The input, as in transformers' exports: `past_key_values.0.key`."""
        return f"past_key_values.{self.join.attention}.{self.join.kind}"

    @property
    def present(self) -> str:
        """The output that is the next call's input: `present.0.key`."""
        return f"present.{self.join.attention}.{self.join.kind}"

    def spec(self, batch: str | int) -> InputSpec:
        """The input as a spec describes it."""
        value = self.node.meta["val"]
        dims = (batch, self.heads, PAST, self.join.tokens.size)
        return InputSpec(self.name, str(value.dtype).removeprefix("torch."), dims)


def new_size(graph: Graph, name: str) -> Any:
    """A size that no input has yet, in the graph's fake-tensor mode."""
    environment = graph.fake_mode.shape_env
    symbol = environment.create_symbol(
        5, source=ConstantSource(f"{name}_{id(graph)}"), dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None
    )
    return environment.create_symintnode(symbol, hint=5)


def add_inputs(graph: Graph, joins: Iterable[Join], ids: fx.Node) -> list[PastInput]:
    """Insert an input for every join, behind the other inputs."""
    batch, past = ids.meta["val"].shape[0], new_size(graph, PAST)
    batches = [node.meta["val"].shape[0] for node in graph.placeholders if node.meta["val"].dim()]
    last, inputs = graph.placeholders[-1], list[PastInput]()
    for join in joins:
        heads = join.tokens.count(batches)
        assert heads is not None
        with graph.module.graph.inserting_after(last):
            last = graph.module.graph.placeholder(f"past_{join.attention}_{join.kind}")
        with graph.fake_mode:
            dtype = join.tokens.node.meta["val"].dtype
            last.meta["val"] = torch.empty(batch, heads, past, join.tokens.size, dtype=dtype)
        inputs.append(PastInput(join, last, heads))
    return inputs


def joined(graph: Graph, past: PastInput, own: fx.Node, sizes: Sequence[fx.Node]) -> tuple[fx.Node, fx.Node]:
    """Join the past with the keys or values of the new tokens.

    Args:
        graph: changed at its insertion point.
        past: the input.
        own: those of the new tokens, with their axes in the attention's order.
        sizes: the nodes of the number of sequences, of new tokens, and of all tokens.

    Returns:
        The joined ones in the attention's order; and as `(batch, heads, tokens, size)`.
    """
    tokens = past.join.tokens
    batch, new, total = sizes
    order = _order(tokens)
    back = [order.index(axis) for axis in range(len(order))]
    part = _permuted(graph, own, order)
    if tokens.heads is None:
        part = graph.call(aten.view.default, part, [batch, past.heads, new, tokens.size], like=own)
    whole = graph.call(aten.cat.default, [past.node, part], 2, like=own)
    flat = whole
    if tokens.heads is None:
        flat = graph.call(aten.view.default, whole, [-1, total, tokens.size], like=own)
    return _permuted(graph, flat, back), whole


def _order(tokens: Tokens) -> list[int]:
    """The axes of an attention's keys in the order of an input."""
    if tokens.heads is None:
        return [0, tokens.sequence, tokens.features]
    return [0, tokens.heads, tokens.sequence, tokens.features]


def _permuted(graph: Graph, node: fx.Node, order: list[int]) -> fx.Node:
    if order == list(range(len(order))):
        return node
    return graph.call(aten.permute.default, node, order, like=node)
