"""Plain integers: a product with calibrated integers becomes one with integers that are rounded to nearest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from adaptc.ir.graph import Graph
from adaptc.quantization.integer import CalibratedBlocks
from adaptc.quantization.operators import LINEAR, tensors_by_name
from adaptc.quantization.scheme import scheme_of
from adaptc.rewriter.expression import splice, trace_expression
from adaptc.rewriter.pipeline import Pass, graph_pass


@graph_pass("plain-integers")
@dataclass(frozen=True)
class PlainIntegers(Pass):
    """quantized_linear(x, awq) = quantized_linear(x / s, int4), and so on: one kernel serves all integer schemes."""

    def call(self, graph: Graph) -> bool:
        """Rewrite every product with a matrix of a calibrated integer scheme."""
        changed = False
        for node in list(graph.nodes):
            if node.target is LINEAR and isinstance(scheme_of(str(node.args[3])), CalibratedBlocks):
                with graph.module.graph.inserting_before(node):
                    result = _plain(graph, node)
                node.replace_all_uses_with(result)
                graph.module.graph.erase_node(node)
                changed = True
        return changed


def _plain(graph: Graph, node: fx.Node) -> fx.Node:
    args: Any = node.args
    x, tensors, bias, text, rows, columns = args
    scheme: Any = scheme_of(text)
    operands, plain = tensors_by_name(tensors, text, rows, columns), scheme.without_inputs()
    integers = plain.stored(rows, columns)
    others = {key: tensor for key, tensor in operands.items() if key not in integers}
    if others:

        def inputs(x: Tensor, **tensors: Tensor) -> Tensor:
            return scheme.transformed_inputs(x, tensors)

        with graph.fake_mode:
            values = {key: tensor.meta["val"] for key, tensor in others.items()}
            traced = trace_expression(inputs, [x.meta["val"]], values)
        x = splice(graph, traced, [x, *others.values()], node, {})
    return graph.call(
        LINEAR, x, [operands[key] for key in integers], bias, plain.text, rows, columns, like=node
    )
