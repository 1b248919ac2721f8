"""The rewrite: what is computed from the token ids, for the new tokens alone."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import fx

from adaptc.errors import Refusal, RefusedError
from adaptc.ir.analysis.attention import replace_operand
from adaptc.ir.analysis.dataflow import walk
from adaptc.ir.analysis.matrix_products import product_terms
from adaptc.ir.analysis.token_axes import MixesTokensError, TokenAxis, TokenMap
from adaptc.ir.analysis.token_rules import is_elementwise
from adaptc.ir.graph import Graph
from adaptc.ir.nodes import RESHAPES, is_tensor, operation, provenance, size_expression
from adaptc.ir.verify import evaluate_again
from adaptc.rewriter.cache.causal import is_causal, mask_of
from adaptc.rewriter.cache.last_tokens import LastTokens
from adaptc.rewriter.cache.past import PastInput, add_counts, joined

aten = torch.ops.aten


class Restriction:
    """Restricts a graph to its last tokens.

    Args:
        graph: rewritten in place; its past inputs are there already.
        ids: the input of token ids.
        tokens: where the tokens are in every value, with those of the past where keys and values are joined.
        past: the inputs of keys and values.
        seen: the input whose length is the number of tokens in the past, where those are in buffers.
    """

    def __init__(
        self, graph: Graph, ids: fx.Node, tokens: TokenMap, past: list[PastInput], seen: fx.Node | None
    ):
        self.graph, self.ids, self.map, self.pasts = graph, ids, tokens, past
        self.order = list(graph.nodes)
        self.counts = add_counts(graph, ids, past[0], seen)
        self.tokens = size_expression(ids.meta["val"].shape[1])
        self.last = LastTokens(graph, self.tokens, self.counts, set(tokens.axes))
        self.causal: fx.Node | None = None
        self.presents: dict[str, fx.Node] = {}
        self._joined: dict[tuple[fx.Node, str], fx.Node] = {}

    def run(self) -> None:
        """Rewrite every operation.

        Raises:
            RefusedError: an operation meets masks or positions in a way that cannot be cut; names it.
        """
        self._lengthen_inputs()
        for node in self.order:
            if node.op != "call_function":
                continue
            if node in self.map.axes:
                with self.graph.module.graph.inserting_before(node):
                    try:
                        self._rewrite(node)
                    except MixesTokensError as error:
                        raise RefusedError([refusal(node, str(error))]) from error
                evaluate_again(self.graph, node)
            elif operation(node) == "sym_size" and node.args[0] in self.map.axes:
                evaluate_again(self.graph, node)

    def live(self) -> set[fx.Node]:
        """What the outputs are computed from."""
        output = next(node for node in self.graph.nodes if node.op == "output")
        return set(walk([output], lambda node: node.all_input_nodes))

    def _lengthen_inputs(self) -> None:
        """Inputs along the tokens are of all tokens, until it is seen whether only the last are read."""
        for node in self.order:
            if node.op == "placeholder" and node is not self.ids and self.last.has_tokens(node):
                sizes = [
                    self.counts.total.meta["val"] if size_expression(size) == self.tokens else size
                    for size in node.meta["val"].shape
                ]
                with self.graph.fake_mode:
                    node.meta["val"] = torch.empty(sizes, dtype=node.meta["val"].dtype)

    def _rewrite(self, node: fx.Node) -> None:
        for operand in node.all_input_nodes:
            if operand in self.map.axes or not is_tensor(operand) or operand not in self.last.traced:
                continue
            part = self._part(node, operand)
            if part is not operand:
                node.replace_input_with(operand, part)
        self._count(node)
        for past in self.pasts:
            if past.join.tokens.user is node:
                self._join(node, past)
        if is_causal(node):
            self._mask(node)

    def _part(self, node: fx.Node, operand: fx.Node) -> fx.Node:
        """What an operation on the new tokens reads in the place of a mask, a position and the like."""
        along = [axis for axis, size in enumerate(self.last.shape(operand)) if size == self.tokens]
        if not along and self.last.counts_rows(operand):
            return cast(fx.Node, self.last.rows(operand))
        new = [axis for axis in along if not self._meets_past(node, operand, axis)]
        if len(new) > 1:
            raise MixesTokensError(f"two axes of %{operand.name} are along its tokens")
        return self.last.last(operand, new[0]) if new else cast(fx.Node, self.last.whole(operand))

    def _meets_past(self, node: fx.Node, operand: fx.Node, axis: int) -> bool:
        """Whether an axis of an operand is along the tokens of past and present; else along the new ones."""
        rank = self.last.traced[operand].dim()
        if mask_of(node) is operand:
            return axis == rank - 1
        terms = product_terms(node)
        if terms is not None:
            letters = dict(terms[0])[operand]
            met = [
                a
                for other, new in terms[0]
                for a in self._axes_in(node, other)
                if new[a.axis] == letters[axis]
            ]
        elif is_elementwise(node) or operation(node) in ("cat", "stack"):
            position = axis + self.last.traced[node].dim() - rank
            met = [a for a in self.map.axes[node] if a.axis == position]
        else:
            met = []
        if not met:
            raise MixesTokensError(f"%{operand.name} is along the tokens, and it is not known how it is read")
        return met[0].past

    def _axes_in(self, node: fx.Node, operand: fx.Node) -> tuple[TokenAxis, ...]:
        """The axes of an operand as an operation reads it, joined with the past where it is."""
        axes = self.map.axes.get(operand, ())
        reads = [p.join.tokens for p in self.pasts if p.join.tokens.user is node]
        if any(tokens.node is operand for tokens in reads):
            return tuple(TokenAxis(a.axis, a.before, a.after, past=True) for a in axes)
        return axes

    def _count(self, node: fx.Node) -> None:
        """Give an operation the numbers of tokens that it names."""
        sizes = [n for n in node.all_input_nodes if self.last.is_size(n) and self.last.depends(n)]
        if not sizes:
            return
        axes = {axis.axis: axis for axis in self.map.axes[node]}
        name = operation(node)
        if name in {*RESHAPES, "expand"}:
            named = list(cast(list[Any], node.args[1]))
            node.update_arg(1, [self._sized(size, axes.get(position)) for position, size in enumerate(named)])
            return
        source = self.map.axes.get(cast(fx.Node, node.args[0]), ())
        if any(axis.past for axis in (*axes.values(), *source)):
            if name != "slice":
                raise MixesTokensError("it names a number of tokens, of the past or new ones")
            along = cast(int, node.args[1]) % self.last.traced[node].dim()
            tokens = self.counts.total if any(a.past and a.axis == along for a in source) else self.counts.new
        else:
            tokens = self.counts.new
        for size in sizes:
            node.replace_input_with(size, self.last.count(size, tokens))

    def _sized(self, size: Any, axis: TokenAxis | None) -> Any:
        if not self.last.depends(size):
            return size
        if axis is None:
            raise MixesTokensError("its view names a number of tokens for another axis")
        return self.last.count(size, self.counts.total if axis.past else self.counts.new)

    def _join(self, node: fx.Node, past: PastInput) -> None:
        new = past.join.tokens.node
        key = (new, past.join.name)
        if key not in self._joined:
            self._joined[key], self.presents[past.join.present] = joined(self.graph, past, new, self.counts)
        replace_operand(node, past.join.tokens.argument, self._joined[key])

    def _mask(self, node: fx.Node) -> None:
        """A causal attention gets a mask: a new token sees all of the past."""
        if self.causal is None:
            self.causal = self._causal(node)
        args = [*node.args, *(None, 0.0, False)[len(node.args) - 3 :]]
        args[3], args[5] = self.causal, False
        node.args = tuple(args)
        node.kwargs = {
            key: value for key, value in node.kwargs.items() if key not in ("attn_mask", "is_causal")
        }

    def _causal(self, like: fx.Node) -> fx.Node:
        """Whether a token, the last axis, is seen by a new one: `(new, total)`."""
        device = {"device": torch.device("cpu")}
        first = next(n for n in self.order if n.op == "call_function")
        with self.graph.module.graph.inserting_before(first):
            seen = self.last.call(aten.arange.default, self.counts.total, like=like, **device)
            seeing = self.last.call(aten.arange.start, self.counts.past, self.counts.end, like=like, **device)
            column = self.last.call(aten.unsqueeze.default, seeing, 1, like=like)
            return self.last.call(aten.le.Tensor, seen, column, like=like)


def refusal(node: fx.Node, why: str) -> Refusal:
    """Why a graph can have no cache: a node, with its module and source line."""
    place = "; ".join(provenance(node))
    return Refusal(f"%{node.name}, {operation(node)}: {why}" + (f"; {place}" if place else ""))
