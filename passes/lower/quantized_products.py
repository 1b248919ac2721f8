"""Quantized products: a product with what bits stand for becomes one operation, which keeps no weight."""

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

    Torch would keep every dequantized weight for the gradient: a model of 4 bits would train in the memory of a whole.
    """

    def call(self, graph: Graph) -> bool:
        """Rewrite every product with a quantized matrix, or with one of which rows are."""
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
    """Rows of E; None if no bits stand for it."""
    if E.target is not DEQUANTIZE:
        return None
    return graph.call(EMBEDDING, ids, *E.args, like=node)


def _apply(graph: Graph, node: fx.Node, x: fx.Node, E: Any, flipped: bool, bias: Any) -> fx.Node | None:
    """`E x + bias` for E (out, in), or stored (in, out): `flipped`; None if no bits stand for E."""
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
        made = [
            p if p is not None else graph.call(aten.linear.default, x, e, like=node)
            for p, e in zip(pieces, args[0], strict=True)
        ]
        whole = graph.call(aten.cat.default, made, -1, like=node)
        return whole if bias is None else graph.call(aten.add.Tensor, whole, bias, like=node)
    return None
