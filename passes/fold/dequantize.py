"""Dequantize: what bits stand for becomes a stored weight again."""

from __future__ import annotations

from dataclasses import dataclass

from adaptc.errors import Refusal
from adaptc.ir.graph import Graph
from adaptc.rewriter.expression import FoldedWeight, extract_expression
from adaptc.rewriter.pipeline import Pass, graph_pass
from adaptc.rewriter.quantize import drop_unread_quantized


@graph_pass("dequantize")
@dataclass(frozen=True)
class Dequantize(Pass):
    """W = dequantize(bits), stored in the weight's own dtype under the base's own name: nothing is in bits any more.

    For products that hold floats only, such as a checkpoint that other tools read.
    """

    def requires(self, graph: Graph) -> list[Refusal]:
        """What bits stand for is a value of the graph."""
        nodes = graph.by_name()
        taken = [name for name, found in graph.quantized.items() if found.value not in nodes]
        words = f"{', '.join(taken[:3])}: products read the bits already"
        return [Refusal(words, notes=("let `dequantize` stand in front",))] if taken else []

    def call(self, graph: Graph) -> bool:
        """Read the stored weights instead."""
        quantized = dict(graph.quantized)
        for name, found in quantized.items():
            value = graph.by_name()[found.value]
            weight = FoldedWeight(found.site.shape, found.site.dtype, extract_expression(graph, value))
            graph.restore(name, weight)
            value.replace_all_uses_with(graph.parameter_node(name))
        graph.module.graph.eliminate_dead_code()
        drop_unread_quantized(graph, quantized)
        return bool(quantized)

    def ensures(self, graph: Graph) -> str | None:
        """No bits are left."""
        return f"{', '.join(graph.quantized)} are left in bits" if graph.quantized else None
