"""Query, key and value products of one attention as one product, whose weight has the rows of all three."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import fx

from adaptc.ir.graph import Graph
from adaptc.ir.nodes import is_tensor
from adaptc.rewriter.pipeline import Pass
from adaptc.weights import Deferred, Weight

aten = torch.ops.aten
onnx: Any = torch.ops.adaptc_onnx
ATTENTION: Any = onnx.grouped_attention.default
NBITS: Any = onnx.matmul_nbits.default
ROWS = 5
"""The position of the number of rows among the arguments of `NBITS`."""


@dataclass(frozen=True)
class PackedQueries(Pass):
    """`x Qᵀ, x Kᵀ, x Vᵀ` becomes `x (Q, K, V)ᵀ` where GroupQueryAttention reads the three, which takes them as one.

    Weights are floats, or codes of one scheme. Other products of the same activations are left apart: a split costs
    more than is won.
    """

    name: ClassVar[str] = "packed-queries"
    takes: ClassVar[frozenset[str]] = frozenset({"evaluated"})
    changes_results: ClassVar[bool] = True

    def call(self, graph: Graph) -> bool:
        """Pack the products of every attention that has such."""
        attentions = [n for n in graph.nodes if n.target is ATTENTION and _are_alike(n.args[:3], n)]
        for attention in attentions:
            products = cast(Sequence[fx.Node], attention.args[:3])
            whole = _packed(graph, products)
            attention.args = (whole, None, None, *attention.args[3:])
            for product in products:
                graph.module.graph.erase_node(product)
        return bool(attentions)


def _are_alike(products: Sequence[Any], attention: fx.Node) -> bool:
    """Whether these are products of the same activations, of one kind, that this attention alone reads."""
    return all(isinstance(p, fx.Node) and list(p.users) == [attention] for p in products) and (
        len({_kind(product) for product in products}) == 1 and _kind(products[0]) is not None
    )


def _kind(node: fx.Node) -> Any:
    """What products have in common that can be one; None of a node that is no such product."""
    arguments = cast(tuple[Any, ...], node.args)
    if node.target not in (NBITS, aten.linear.default):
        return None
    if any(is_tensor(a) and a.op != "get_attr" for a in arguments[1:]):
        return None
    given = tuple(a is None if a is None or is_tensor(a) else a for a in arguments[1:])
    sizes = given[: ROWS - 1] + given[ROWS:] if node.target is NBITS else given
    return node.target, arguments[0], sizes


def _packed(graph: Graph, products: Sequence[fx.Node]) -> fx.Node:
    first = products[0]
    columns = list(zip(*(product.args for product in products), strict=True))
    args = [_together(graph, c) if n and is_tensor(c[0]) else c[0] for n, c in enumerate(columns)]
    if first.target is NBITS:
        args[ROWS] = sum(columns[ROWS])
    last = max(products, key=list(graph.nodes).index)
    with graph.module.graph.inserting_after(last):
        return graph.call(first.target, *args, like=first)


def _together(graph: Graph, nodes: Sequence[Any]) -> fx.Node:
    """The weight that has the rows of these."""
    names = [str(node.target) for node in nodes]
    name = f"{names[0]}_and_{len(names) - 1}_more"
    if name not in graph.weights:
        weights = [graph.weights[n] for n in names]
        shape = (sum(weight.shape[0] for weight in weights), *weights[0].shape[1:])
        graph.attach(name, Deferred(shape, weights[0].dtype, _joined(weights)), trained=False)
    return graph.parameter_node(name)


def _joined(weights: Sequence[Weight]) -> Callable[[], torch.Tensor]:
    return lambda: torch.cat([weight.load() for weight in weights])
