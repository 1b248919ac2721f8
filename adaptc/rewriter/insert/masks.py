"""Masks and biases of attentions, made wider for virtual tokens in front, which every query sees."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import fx

from adaptc.errors import Refusal, RefusedError
from adaptc.ir.analysis.attention import Attention
from adaptc.ir.analysis.dataflow import ancestors, walk
from adaptc.ir.graph import Graph
from adaptc.ir.nodes import RESHAPES, operation, provenance
from adaptc.rewriter.insert.positions import behind
from adaptc.rewriter.insert.relative_bias import RelativeBias, bias_table, numeric_ancestors
from adaptc.rewriter.pipeline import Pass

aten = torch.ops.aten
NEUTRAL: Mapping[str, float] = {
    **dict.fromkeys(("add", "add_", "sub", "sub_", "masked_fill", "masked_fill_"), 0.0),
    **dict.fromkeys(("mul", "mul_", "div", "div_", "where"), 1.0),
}
"""Operation on scores -> the value of its other operand that leaves a score as it is."""
SIZED = RESHAPES | {"expand"}
"""Views that name the sizes of their result."""


class Masks:
    """Makes the masks and biases of attentions `count` columns wider in front.

    Args:
        graph: the host.
        count: how many virtual tokens, or the node of this number.
        source: the pass that asks, which refusals name.
    """

    def __init__(self, graph: Graph, count: int | fx.Node, source: Pass):
        self.graph, self.count, self.source = graph, count, source
        self._padded: dict[tuple[fx.Node, float], fx.Node] = {}
        self._relative = RelativeBias(graph, count, self._padded_to)

    def widen(self, attention: Attention) -> None:
        """Let every query of an attention see the virtual tokens in front; the keys are put there by the caller.

        Raises:
            RefusedError: something is computed from the scores that is not followed.
        """
        if attention.fused:
            self._fused(attention.mixed)
        else:
            self._written_out(attention)

    def _fused(self, node: fx.Node) -> None:
        """`scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)`."""
        args: list[Any] = [*node.args, *(None, 0.0, False)[len(node.args) - 3 :]]
        if args[5]:
            args[3], args[5] = self._padded_to(self._causal(node), 1.0), False
        elif args[3] is not None:
            args[3] = self._wider(args[3], 1.0 if args[3].meta["val"].dtype == torch.bool else 0.0, node)
        node.args = tuple(args)

    def _causal(self, node: fx.Node) -> fx.Node:
        """A causal mask: a query sees the keys up to its own position."""
        query: Any = node.args[0]
        with self.graph.module.graph.inserting_before(node):
            length = self._call(
                aten.sym_size.int, query, -2, like=node
            )  # of the keys too: this is self-attention
            ones = self._call(aten.new_ones.default, query, [length, length], like=node)
            lower = self._call(aten.tril.default, ones, like=node)
            return self._call(aten.to.dtype, lower, torch.bool, like=node)

    def _written_out(self, attention: Attention) -> None:
        """Widen the operands of everything between the product of query and key and the product with the values."""
        path = set(walk([attention.scores], lambda n: [u for u in n.users if u is not attention.mixed]))
        scores, before = attention.scores, ancestors(attention.mixed)
        added: Any = scores.args[0]
        if operation(scores) == "baddbmm" and _is_wide(added):
            scores.update_arg(0, self._wider(added, 0.0, scores))
        length = scores.meta["val"].shape[-1]
        for node in [n for n in self.graph.nodes if n in path and n in before and n is not scores]:
            if operation(node) in SIZED:
                self._resize(node, length)
            for index, argument in enumerate(node.args):
                if isinstance(argument, fx.Node) and argument not in path and _is_wide(argument):
                    node.update_arg(index, self._beside(node, index, argument, path))

    def _beside(self, node: fx.Node, index: int, argument: fx.Node, path: set[fx.Node]) -> fx.Node:
        """The other operand of an operation on scores, made wider."""
        name = operation(node)
        if name not in NEUTRAL or (name == "where" and index != 0):
            raise self._not_understood(node, f"{name} is not a known operation on scores")
        neutral = NEUTRAL[name]
        if name == "where" and node.args[1] not in path:  # the scores are chosen where the condition is false
            neutral = 0.0
        return self._wider(argument, neutral, node)

    def _resize(self, node: fx.Node, length: object) -> None:
        """Let a view that names the number of keys name the larger number."""
        sizes: list[Any] = list(cast("Any", node.args[1]))
        last = sizes[-1]
        if isinstance(last, fx.Node):
            with self.graph.module.graph.inserting_before(node):
                sizes[-1] = self._call(aten.sym_size.int, node.args[0], -1, like=node)
        elif last not in (-1, 1) and last == length:
            with self.graph.module.graph.inserting_before(node):
                sizes[-1] = self._more(last, node)
        node.update_arg(1, sizes)

    def _more(self, length: int, like: fx.Node) -> int | fx.Node:
        """How many keys there are with the virtual tokens."""
        if isinstance(self.count, int):
            return length + self.count
        return self._call(operator.add, self.count, length, like=like)

    def _wider(self, mask: fx.Node, neutral: float, node: fx.Node) -> fx.Node:
        """A mask with `count` neutral columns in front; a bias that depends on positions is computed for those too.

        Args:
            mask: an operand of an operation on scores; one without a column for each key stays as it is.
            neutral: the value that leaves a score as it is.
            node: the operation, for messages.
        """
        if not _is_wide(mask):
            return mask
        if bias_table(mask) is not None:
            try:
                return self._relative.extended(mask, mask.meta["val"].dim() - 1)
            except ValueError as error:
                raise self._not_understood(node, str(error)) from error
        if any(operation(source) in ("arange", "cumsum") for source in numeric_ancestors(mask)):
            why = "it adds a bias that is computed from positions, and not looked up in a table"
            raise self._not_understood(node, why)
        return self._padded_to(mask, neutral)

    def _padded_to(self, mask: fx.Node, neutral: float) -> fx.Node:
        """A mask with `count` columns of a value in front; the same node each time it is asked for."""
        if (mask, neutral) not in self._padded:
            with self.graph.module.graph.inserting_after(behind(mask, self.count)):
                value = bool(neutral) if mask.meta["val"].dtype == torch.bool else neutral
                padded = self._call(aten.constant_pad_nd.default, mask, [self.count, 0], value, like=mask)
            self._padded[mask, neutral] = padded
        return self._padded[mask, neutral]

    def _call(self, target: object, *args: Any, like: fx.Node) -> fx.Node:
        return self.graph.call(target, *args, like=like)

    def _not_understood(self, node: fx.Node, why: str) -> RefusedError:
        message = f"the attention at {node.name} is not understood: {why}"
        refusal = Refusal(message, (node.name,), (*provenance(node), "leave it out with `exclude`"))
        return RefusedError([refusal], self.source)


def _is_wide(node: fx.Node) -> bool:
    """Whether a value has a column for each key."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape[-1] != 1
