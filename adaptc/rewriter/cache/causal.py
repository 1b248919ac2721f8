"""Whether an attention is causal: no token gets a share of a later one."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from adaptc.ir.analysis.attention import FUSED, Attention
from adaptc.ir.analysis.dataflow import walk
from adaptc.ir.example_inputs import example_sizes, example_tensors
from adaptc.ir.graph import Graph
from adaptc.ir.nodes import apply_operation, operation, size_expression

NEGLIGIBLE = 1e-6
"""The largest share of an attention that counts as none. Chosen: masks of -1e4 or less leave exactly 0 in float32."""


class Shares:
    """What each token gets of the others in an attention whose scores are all 0: what masks and biases leave.

    Args:
        graph: the graph; weights that masks are made of are loaded.
        content: what is computed from the token ids.
    """

    def __init__(self, graph: Graph, content: set[fx.Node]):
        self.graph, self.content = graph, content
        examples = example_tensors(graph.inputs, example_sizes(graph.inputs))
        self.sizes: dict[Any, int] = {}
        self.values: dict[fx.Node, Any] = {}
        for node, spec in zip(graph.placeholders, graph.inputs, strict=True):
            self.values[node] = examples[spec.name]
            sizes = zip(node.meta["val"].shape, examples[spec.name].shape, strict=True)
            self.sizes |= {size_expression(s): n for s, n in sizes if isinstance(s, torch.SymInt)}

    def is_causal(self, attention: Attention) -> bool:
        """Whether no token gets a share of a later one."""
        if is_causal(attention.mixed):
            return True
        shares = self._of_mask(attention) if attention.fused else self._of_scores(attention)
        if shares is None:
            return False
        later = shares.nan_to_num().triu(shares.shape[-1] - shares.shape[-2] + 1)
        return bool((later < NEGLIGIBLE).all())

    def _of_mask(self, attention: Attention) -> torch.Tensor | None:
        mask = mask_of(attention.mixed)
        if mask is None:
            return None
        value = self._value(mask, dict(self.values), set())
        return (value.float().log() if value.dtype == torch.bool else value.float()).softmax(-1)

    def _of_scores(self, attention: Attention) -> torch.Tensor:
        between = set(walk([attention.scores], lambda node: list(node.users)))
        scores = {attention.scores: torch.zeros(self._shape(attention.scores))}
        return self._value(attention.softmax, self.values | scores, between)

    def _shape(self, node: fx.Node) -> list[int]:
        return [int(size_expression(size).subs(self.sizes)) for size in node.meta["val"].shape]

    def _value(self, node: fx.Node, values: dict[fx.Node, Any], between: set[fx.Node]) -> Any:
        """The value of a node; of content that is not computed from the scores, zeros."""
        if node not in values:
            if node in self.content and node not in between:
                values[node] = torch.zeros(self._shape(node), dtype=node.meta["val"].dtype)
            elif node.op == "get_attr":
                values[node] = self.graph.weights[str(node.target)].load()
            else:
                for operand in node.all_input_nodes:
                    self._value(operand, values, between)
                with torch.no_grad():
                    values[node] = apply_operation(node, values.__getitem__)
        return values[node]


def mask_of(attention: fx.Node) -> fx.Node | None:
    """The mask argument of an attention that is one operation; None of any other."""
    if operation(attention) != FUSED:
        return None
    mask = attention.args[3] if len(attention.args) > 3 else attention.kwargs.get("attn_mask")
    return mask if isinstance(mask, fx.Node) else None


def is_causal(attention: fx.Node) -> bool:
    """Whether this is an attention in one operation that is told to be causal."""
    if operation(attention) != FUSED:
        return False
    return bool(attention.args[5] if len(attention.args) > 5 else attention.kwargs.get("is_causal", False))
