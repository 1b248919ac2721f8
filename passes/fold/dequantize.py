"""Dequantize: each quantized weight becomes a weight in floats again."""

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
    """W = dequantize(codes, …), stored in the weight's own dtype under the base's own name; nothing stays quantized.

    For artifacts that hold floats only, such as a checkpoint that other tools read.
    """

    def requires(self, graph: Graph) -> list[Refusal]:
        """Every dequantized weight is a value of the graph: no matrix product reads the codes itself."""
        nodes = graph.by_name()
        lowered = [name for name, leaf in graph.quantized.items() if leaf.value not in nodes]
        if not lowered:
            return []
        reason = f"{', '.join(lowered[:3])}: matrix products read the codes already"
        return [Refusal(reason, notes=("write `dequantize` before the pass that lowers them",))]

    def call(self, graph: Graph) -> bool:
        """Let what reads a dequantized weight read a stored one."""
        quantized = dict(graph.quantized)
        for name, leaf in quantized.items():
            value = graph.by_name()[leaf.value]
            weight = FoldedWeight(leaf.site.shape, leaf.site.dtype, extract_expression(graph, value))
            graph.restore(name, weight)
            value.replace_all_uses_with(graph.parameter_node(name))
        graph.module.graph.eliminate_dead_code()
        drop_unread_quantized(graph, quantized)
        return bool(quantized)

    def ensures(self, graph: Graph) -> str | None:
        """No weight is left quantized."""
        return f"still quantized: {', '.join(graph.quantized)}" if graph.quantized else None
