"""The pass that gives a decoder a key-value cache."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import fx
from torch.fx.graph import CodeGen

from adaptc.errors import Refusal
from adaptc.inputs import InputSpec
from adaptc.ir.analysis.token_axes import TokenMap
from adaptc.ir.analysis.token_map import Join, attentions_of, content_of, find_joins, map_tokens
from adaptc.ir.graph import Graph
from adaptc.ir.nodes import is_tensor, size_expression
from adaptc.ir.verify import refresh
from adaptc.rewriter.cache.causal import Shares
from adaptc.rewriter.cache.inputs import drop_unread, token_ids
from adaptc.rewriter.cache.past import TOTAL, Counts, add_inputs, add_seen
from adaptc.rewriter.cache.restriction import Restriction, refusal
from adaptc.rewriter.pipeline import Pass

aten = torch.ops.aten


@dataclass(frozen=True)
class Cache(Pass):
    """`f(tokens)` becomes `f(new tokens, keys and values of the past)`: the same graph, restricted to its last tokens.

    What is computed from the token ids is computed for the new tokens alone. Everything else, such as masks, positions
    and rotary tables, is computed for all tokens and cut where the two meet. This is right where tokens meet in causal
    attention only; anything else is refused.

    Each attention gets the inputs `past_key_values.{i}.key` and `.value`, `(batch, heads, past, size)`, of which the
    past may be empty, and the outputs `present.{i}.key` and `.value`. A mask is of past and new tokens.

    Attributes:
        buffers: the inputs have room for all tokens, `(batch, heads, total, size)`, and those of the new tokens are
            written into them. The input `seen` is as long as the past, and a mask as the room. There are no new
            outputs.
    """

    buffers: bool = False

    name: ClassVar[str] = "cache"
    takes: ClassVar[frozenset[str]] = frozenset({"traced", "adapted", "factored", "folded", "evaluated"})
    changes_results: ClassVar[bool] = True

    def requires(self, graph: Graph) -> list[Refusal]:
        """Tokens meet in causal attention only."""
        ids = token_ids(graph)
        if isinstance(ids, Refusal):
            return [ids]
        joins, tokens, refusals = _analysed(graph, ids)
        if refusals:
            return refusals
        shares = Shares(graph, set(tokens.axes))
        read = {join.attention for join in joins}
        return [
            refusal(
                a.mixed, "a token sees later ones (the attention is not causal), which a cache cannot hold"
            )
            for number, a in enumerate(attentions_of(graph.nodes, tokens.axes))
            if number in read and not shares.is_causal(a)
        ]

    def call(self, graph: Graph) -> bool:
        """Restrict the graph to its last tokens.

        Raises:
            RefusedError: something cannot be cut; names the operation.
        """
        ids = token_ids(graph)
        assert isinstance(ids, fx.Node)
        joins, tokens, _ = _analysed(graph, ids)
        spec = next(s for s, node in zip(graph.inputs, graph.placeholders, strict=True) if node is ids)
        past = add_inputs(graph, joins, ids, self.buffers)
        graph.inputs = (*graph.inputs, *(p.spec(spec.dims[0]) for p in past))
        seen = None
        if self.buffers:
            seen, length = add_seen(graph)
            graph.inputs = (*graph.inputs, length)
        restriction = Restriction(graph, ids, tokens, past, seen)
        restriction.run()
        _give(graph, {} if self.buffers else restriction.presents)
        whole = _shorten_inputs(graph, restriction)
        if whole is not None and not self.buffers:
            _count_from(graph, restriction.counts, *whole)
        graph.module.graph.eliminate_dead_code(
            is_impure_node=lambda node: node.op in ("placeholder", "output")
        )
        drop_unread(graph)
        refresh(graph)
        return True


def tokens_meet(graph: Graph) -> list[Refusal]:
    """Where tokens meet outside attention, so that a graph can have no cache. No weight is read."""
    ids = token_ids(graph)
    if isinstance(ids, Refusal):
        return [ids]
    return _analysed(graph, ids)[2]


def _analysed(graph: Graph, ids: fx.Node) -> tuple[list[Join], TokenMap, list[Refusal]]:
    """Where keys and values are joined, where the tokens are, and why that is not known or they meet elsewhere."""
    content = content_of(ids)
    joins, unclear = find_joins(graph.nodes, content)
    refusals = [refusal(node, why) for node, why in unclear]
    number = size_expression(ids.meta["val"].shape[1])
    if number.is_Integer:
        refusals.append(
            Refusal(
                f"the number of tokens is fixed at {number}",
                notes=("name it in `inputs`: int64[batch, seq]",),
            )
        )
    if not joins and not refusals:
        refusals.append(Refusal("no token attends to another: there are no keys and values to hold"))
    tokens = map_tokens(graph.nodes, ids, number, joins)
    refusals += [
        refusal(node, f"{why}, so that it cannot run on new tokens alone") for node, why in tokens.mixing
    ]
    return joins, tokens, refusals


def _give(graph: Graph, presents: Mapping[str, fx.Node]) -> None:
    """Let the graph give the keys and values too, as a plain tuple."""
    output = next(node for node in graph.nodes if node.op == "output")
    results: Any = output.args[0]
    output.args = ((*cast(list[Any], results), *presents.values()),)
    graph.outputs = (*graph.outputs, *presents)
    graph.module.graph.set_codegen(CodeGen())


def _shorten_inputs(graph: Graph, restriction: Restriction) -> tuple[fx.Node, int] | None:
    """Inputs of which only the last tokens are read are of the new tokens; the others are of all.

    Returns:
        An input of all tokens, and which of its axes they lie along.
    """
    whole: tuple[fx.Node, int] | None = None
    specs: list[InputSpec] = []
    for node, spec in zip(graph.placeholders, graph.inputs, strict=True):
        if node is restriction.ids or not restriction.last.has_tokens(node):
            specs.append(spec)
            continue
        axis = restriction.last.shape(node).index(restriction.tokens)
        readers = [user for user in node.users if is_tensor(user) and user in restriction.live()]
        cuts = [user for user in readers if user in restriction.last.cuts]
        if readers == cuts:
            node.meta["val"] = restriction.last.traced[node]
            for cut in cuts:
                cut.replace_all_uses_with(node)
            specs.append(spec)
        else:
            whole = whole or (node, axis)
            specs.append(replace(spec, dims=(*spec.dims[:axis], TOTAL, *spec.dims[axis + 1 :])))
    graph.inputs = tuple(specs)
    return whole


def _count_from(graph: Graph, counts: Counts, mask: fx.Node, axis: int) -> None:
    """Read the number of tokens from a mask: a past that is a shared buffer is longer than what is in it."""
    with graph.module.graph.inserting_before(counts.past):
        total = graph.call(aten.sym_size.int, mask, axis, like=counts.end)
        past = graph.call(operator.sub, total, counts.new, like=counts.past)
    counts.past.replace_all_uses_with(past)
    counts.end.replace_all_uses_with(total)
