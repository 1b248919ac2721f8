"""Quantized matrix products: a product with a dequantized weight becomes one operation, which keeps no such weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from adaptc.ir.analysis.affine_maps import Embedding, Linear, as_affine_map
from adaptc.ir.graph import Graph
from adaptc.quantization.operators import DEQUANTIZE, EMBEDDING, LINEAR
from adaptc.rewriter.pipeline import Pass, graph_pass

aten = torch.ops.aten


@graph_pass("quantized-products")
@dataclass(frozen=True)
class QuantizedProducts(Pass):
    """linear(x, dequantize(q), b) = quantized_linear(x, q, b), whatever layout the weight was stored in; lookups too.

    Torch would keep every dequantized weight for the gradient: a model of 4 bits would need the memory of its floats to
    train.
    """

    def call(self, graph: Graph) -> bool:
        """Rewrite every matrix product and lookup whose weight is quantized, as a whole or some of its rows."""
        changed = False
        for node in list(graph.nodes):
            read = as_affine_map(node) if node.op == "call_function" else None
            if read is None or not isinstance(read.affine, Linear | Embedding):
                continue
            with graph.module.graph.inserting_before(node):
                if isinstance(read.affine, Embedding):
                    result = _looked_up(graph, node, read.x, read.weight)
                else:
                    result = _apply(graph, node, read.x, read.weight, read.flipped, read.bias)
            if result is not None:
                node.replace_all_uses_with(result)
                graph.module.graph.erase_node(node)
                changed = True
        return changed


def _looked_up(graph: Graph, node: fx.Node, ids: fx.Node, E: Any) -> fx.Node | None:
    """The lookup of `ids` in E (entries, features); None if E is not a dequantized matrix."""
    if E.target is not DEQUANTIZE:
        return None
    return graph.call(EMBEDDING, ids, *E.args, like=node)


def _apply(graph: Graph, node: fx.Node, x: fx.Node, E: Any, flipped: bool, bias: Any) -> fx.Node | None:
    """`E x + bias` for E (out, in), or (in, out) where it is `flipped`; None if no part of E is dequantized."""
    args: Any = E.args
    if E.target is DEQUANTIZE and not flipped:
        tensors, text, rows, columns, _ = args
        return graph.call(LINEAR, x, tensors, bias, text, rows, columns, like=node)
    if "quantized" not in E.meta:
        return None
    if E.target is aten.t.default:
        return _apply(graph, node, x, args[0], not flipped, bias)
    if E.target is aten.cat.default and not flipped and (len(args) < 2 or args[1] == 0):
        pieces = [_apply(graph, node, x, piece, False, None) for piece in args[0]]
        parts = [
            result if result is not None else graph.call(aten.linear.default, x, rows, like=node)
            for result, rows in zip(pieces, args[0], strict=True)
        ]
        y = graph.call(aten.cat.default, parts, -1, like=node)
        return y if bias is None else graph.call(aten.add.Tensor, y, bias, like=node)
    return None
