"""Casts: the implicit casts of ATen's operations become operations of their own."""

# pyright: reportPrivateUsage=false
# torch's table of type promotion has no public name.

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch._dispatch.python import enable_python_dispatcher
from torch.fx.traceback import preserve_node_meta

from adaptc.ir.graph import Graph
from adaptc.rewriter.pipeline import Pass


@dataclass(frozen=True)
class Casts(Pass):
    """add(x, n) becomes add(x, cast(n)), wherever an operand needs another dtype: ONNX's operations cast nothing."""

    name: ClassVar[str] = "onnx-casts"
    takes: ClassVar[frozenset[str]] = frozenset({"onnx"})

    def call(self, graph: Graph) -> bool:
        """Insert a cast wherever ATen's rules of type promotion cast an operand."""
        from torch.onnx._internal.fx.passes import type_promotion

        table = type_promotion.TypePromotionTable()
        interpreter = type_promotion._TypePromotionInterpreter(graph.module, table)
        interpreter.env = {node: node.meta["val"] for node in graph.nodes if "val" in node.meta}
        before = graph.text()
        with graph.fake_mode, enable_python_dispatcher(), preserve_node_meta():
            for node in list(graph.nodes):
                rule = type_promotion.get_type_promotion_rule(node, table)
                if rule is not None:
                    with interpreter._set_current_node(node):
                        interpreter._maybe_promote_node(node, rule)
        return graph.text() != before
