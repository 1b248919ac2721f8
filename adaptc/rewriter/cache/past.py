"""The keys and values of the past: inputs of a graph, joined with those of the new tokens."""

from __future__ import annotations

import operator
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
SEEN = "seen"
"""The name of an input that tells how many tokens are in the past."""
TOTAL = "total"
"""The name of the dimension of all tokens, past and new; of the room for them, where they are in buffers."""


@dataclass(frozen=True)
class Counts:
    """The nodes of the numbers of tokens in a graph with a cache.

    Attributes:
        batch: sequences.
        new: new tokens of each.
        past: tokens of the past of each.
        end: past and new ones.
        total: how long masks, keys and values are: `end`, or the room in buffers.
    """

    batch: fx.Node
    new: fx.Node
    past: fx.Node
    end: fx.Node
    total: fx.Node


@dataclass(frozen=True)
class PastInput:
    """The keys or the values of one attention.

    Attributes:
        join: where they are joined.
        node: the input, `(batch, heads, past, size)`.
        heads: how many heads it has.
        buffer: whether it has room for the new tokens, `(batch, heads, total, size)`, which are written into it.
    """

    join: Join
    node: fx.Node
    heads: int
    buffer: bool

    def spec(self, batch: str | int) -> InputSpec:
        """The input as a spec describes it."""
        value = self.node.meta["val"]
        dims = (batch, self.heads, TOTAL if self.buffer else PAST, self.join.tokens.size)
        return InputSpec(self.join.name, str(value.dtype).removeprefix("torch."), dims)


SHORT = 2
"""The size that stands for that of the past while shapes are computed: tables of positions may have few rows more than
are traced. Not 1, which broadcasts."""


def new_size(graph: Graph, name: str, hint: int) -> Any:
    """A size that no input has yet, in the graph's fake-tensor mode, computed with as if it were `hint`."""
    environment = graph.fake_mode.shape_env
    source = ConstantSource(f"{name}_{id(graph)}")
    dynamic = DimDynamic.DYNAMIC
    symbol = environment.create_symbol(hint, source=source, dynamic_dim=dynamic, constraint_dim=None)
    return environment.create_symintnode(symbol, hint=hint)


def add_inputs(graph: Graph, joins: Iterable[Join], ids: fx.Node, buffers: bool) -> list[PastInput]:
    """Insert an input for every join, behind the other inputs."""
    batch, tokens = ids.meta["val"].shape
    length = new_size(graph, TOTAL, SHORT + tokens.node.hint + 1) if buffers else new_size(graph, PAST, SHORT)
    batches = [node.meta["val"].shape[0] for node in graph.placeholders if node.meta["val"].dim()]
    inputs = list[PastInput]()
    for join in joins:
        heads, dtype = join.tokens.count(batches), join.tokens.node.meta["val"].dtype
        assert heads is not None
        sizes = (batch, heads, length, join.tokens.size)
        node = add_input(graph, f"past_{join.attention}_{join.kind}", sizes, dtype)
        inputs.append(PastInput(join, node, heads, buffers))
    return inputs


def add_seen(graph: Graph) -> tuple[fx.Node, InputSpec]:
    """Insert the input `seen`, which has an entry for each token of the past: only its length is read."""
    node = add_input(graph, SEEN, (new_size(graph, PAST, SHORT),), torch.bool)
    return node, InputSpec(SEEN, "bool", (PAST,))


def add_input(graph: Graph, name: str, sizes: Sequence[Any], dtype: torch.dtype) -> fx.Node:
    """Insert an input behind the others."""
    with graph.module.graph.inserting_after(graph.placeholders[-1]):
        node = graph.module.graph.placeholder(name)
    with graph.fake_mode:
        node.meta["val"] = torch.empty(sizes, dtype=dtype)
    return node


def add_counts(graph: Graph, ids: fx.Node, past: PastInput, seen: fx.Node | None) -> Counts:
    """Insert the numbers of tokens in front of the first operation.

    Args:
        graph: changed.
        ids: the input of token ids.
        past: the input of some keys.
        seen: the input whose length is the number of tokens in the past; None where those of `past` are as many.
    """
    first = next(node for node in graph.nodes if node.op == "call_function")
    with graph.module.graph.inserting_before(first):
        batch, new = (graph.call(aten.sym_size.int, ids, axis, like=ids) for axis in (0, 1))
        length = graph.call(aten.sym_size.int, past.node, 2, like=ids)
        before = length if seen is None else graph.call(aten.sym_size.int, seen, 0, like=ids)
        end = graph.call(operator.add, before, new, like=ids)
    return Counts(batch, new, before, end, end if seen is None else length)


def joined(graph: Graph, past: PastInput, new: fx.Node, counts: Counts) -> tuple[fx.Node, fx.Node]:
    """Join the past with the keys or values of the new tokens: one behind the other, or written into the buffer.

    Args:
        graph: changed at its insertion point.
        past: the input.
        new: those of the new tokens, with their axes in the attention's order.
        counts: the numbers of tokens.

    Returns:
        The joined ones in the attention's order; and as `(batch, heads, tokens, size)`.
    """
    part = as_input(graph, past.join.tokens, new, past.heads)
    if past.buffer:
        device = {"device": new.meta["val"].device}
        places = graph.call(aten.arange.start, counts.past, counts.end, like=new, **device)
        whole = graph.call(aten.index_copy_.default, past.node, 2, places, part, like=new)
    else:
        whole = graph.call(aten.cat.default, [past.node, part], 2, like=new)
    return as_operand(graph, past.join.tokens, whole, counts.total), whole


def as_input(graph: Graph, tokens: Tokens, new: fx.Node, heads: int) -> fx.Node:
    """An attention's keys or values as `(batch, heads, tokens, size)`.

    Args:
        graph: changed at its insertion point.
        tokens: the axes of the keys or values.
        new: the keys or values.
        heads: how many heads they have.
    """
    part = _permuted(graph, new, _order(tokens))
    if tokens.heads is not None:
        return part
    length = graph.call(aten.sym_size.int, part, 1, like=new)
    return graph.call(aten.view.default, part, [-1, heads, length, tokens.size], like=new)


def as_operand(graph: Graph, tokens: Tokens, whole: fx.Node, length: fx.Node | None = None) -> fx.Node:
    """What is `(batch, heads, tokens, size)` in the order of an attention's keys or values.

    Args:
        graph: changed at its insertion point.
        tokens: the axes of the keys or values.
        whole: what is put in order.
        length: the node of the number of tokens, where there is one.
    """
    order, flat = _order(tokens), whole
    if tokens.heads is None:
        length = length or graph.call(aten.sym_size.int, whole, 2, like=whole)
        flat = graph.call(aten.view.default, whole, [-1, length, tokens.size], like=whole)
    return _permuted(graph, flat, [order.index(axis) for axis in range(len(order))])


def _order(tokens: Tokens) -> list[int]:
    """The axes of an attention's keys in the order of an input."""
    if tokens.heads is None:
        return [0, tokens.sequence, tokens.features]
    return [0, tokens.heads, tokens.sequence, tokens.features]


def _permuted(graph: Graph, node: fx.Node, order: list[int]) -> fx.Node:
    if order == list(range(len(order))):
        return node
    return graph.call(aten.permute.default, node, order, like=node)
