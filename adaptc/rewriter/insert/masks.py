"""Masks and biases of attentions, made wider for tokens in front that everything sees."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from adaptc.errors import Refusal, RefusedError
from adaptc.ir.analysis.attention import Attention
from adaptc.ir.analysis.dataflow import ancestors, walk
from adaptc.ir.graph import Graph
from adaptc.ir.nodes import operation, provenance
from adaptc.rewriter.insert.relative_bias import Distances, numbers_behind, table_behind
from adaptc.rewriter.pipeline import Pass

aten = torch.ops.aten
NEUTRAL: Mapping[str, float] = {
    **dict.fromkeys(("add", "add_", "sub", "sub_", "masked_fill", "masked_fill_"), 0.0),
    **dict.fromkeys(("mul", "mul_", "div", "div_", "where"), 1.0),
}
"""Operations on scores -> what their other operand is for a score that they leave as it is."""
SIZED = frozenset({"view", "reshape", "expand"})


class Masks:
    """The operands beside the scores of attentions, `count` tokens wider in front."""

    def __init__(self, graph: Graph, count: int, source: Pass):
        self.graph, self.count, self.source = graph, count, source
        self._padded: dict[tuple[fx.Node, float], fx.Node] = {}
        self._distances = Distances(graph, count, self._padded_to)

    def widen(self, attention: Attention) -> None:
        """Let an attention see the tokens in front from everywhere; its keys are as they were."""
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
        """Which keys a query sees: those up to its own place."""
        query: Any = node.args[0]
        with self.graph.module.graph.inserting_before(node):
            length = self._call(aten.sym_size.int, query, -2, like=node)  # of the keys too: they are its own
            whole = self._call(aten.new_ones.default, query, [length, length], like=node)
            return self._call(
                aten.to.dtype, self._call(aten.tril.default, whole, like=node), torch.bool, like=node
            )

    def _written_out(self, attention: Attention) -> None:
        """From the product of query and key to that with the values: all that meets the scores on the way."""
        path = set(walk([attention.scores], lambda n: [u for u in n.users if u is not attention.mixed]))
        scores, before = attention.scores, ancestors(attention.mixed)
        if operation(scores) == "baddbmm" and _is_wide(scores.args[0]):  # type: ignore[arg-type]
            scores.update_arg(0, self._wider(scores.args[0], 0.0, scores))  # type: ignore[arg-type]
        length = scores.meta["val"].shape[-1]
        for node in [n for n in self.graph.nodes if n in path and n in before and n is not scores]:
            if operation(node) in SIZED:
                self._resize(node, length)
            for index, argument in enumerate(node.args):
                if isinstance(argument, fx.Node) and argument not in path and _is_wide(argument):
                    node.update_arg(index, self._beside(node, index, argument, path))

    def _beside(self, node: fx.Node, index: int, argument: fx.Node, path: set[fx.Node]) -> fx.Node:
        name = operation(node)
        if name not in NEUTRAL or (name == "where" and index != 0):
            raise self._not_understood(node, f"{name} is no operation on scores that is known")
        kept = NEUTRAL[name]
        if name == "where" and node.args[1] not in path:  # the scores are where it is false
            kept = 0.0
        return self._wider(argument, kept, node)

    def _resize(self, node: fx.Node, length: Any) -> None:
        """A view that names the number of keys names the larger one."""
        sizes = list(node.args[1])  # type: ignore[arg-type]
        last = sizes[-1]
        if isinstance(last, fx.Node):
            with self.graph.module.graph.inserting_before(node):
                sizes[-1] = self._call(aten.sym_size.int, node.args[0], -1, like=node)
        elif last not in (-1, 1) and last == length:
            sizes[-1] = last + self.count
        node.update_arg(1, sizes)

    def _wider(self, mask: fx.Node, kept: float, node: fx.Node) -> fx.Node:
        """A mask with `count` columns in front that change nothing; a bias that depends on positions grows there."""
        if not _is_wide(mask):
            return mask
        if table_behind(mask) is not None:
            try:
                return self._distances.longer(mask, mask.meta["val"].dim() - 1)
            except ValueError as error:
                raise self._not_understood(node, str(error)) from error
        if any(operation(found) in ("arange", "cumsum") for found in numbers_behind(mask)):
            words = "it adds a bias that is computed from positions, and looked up in no table"
            raise self._not_understood(node, words)
        return self._padded_to(mask, kept)

    def _padded_to(self, mask: fx.Node, kept: float) -> fx.Node:
        if (mask, kept) not in self._padded:
            with self.graph.module.graph.inserting_after(mask):
                value = bool(kept) if mask.meta["val"].dtype == torch.bool else kept
                padded = self._call(aten.constant_pad_nd.default, mask, [self.count, 0], value, like=mask)
            self._padded[mask, kept] = padded
        return self._padded[mask, kept]

    def _call(self, target: Any, *args: Any, like: fx.Node) -> fx.Node:
        return self.graph.call(target, *args, like=like)

    def _not_understood(self, node: fx.Node, why: str) -> RefusedError:
        message = f"the attention at {node.name} is not understood: {why}"
        refusal = Refusal(message, (node.name,), (*provenance(node), "leave it out with `exclude`"))
        return RefusedError([refusal], self.source)


def _is_wide(node: fx.Node) -> bool:
    """Whether a value has a column for each key."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape[-1] != 1
