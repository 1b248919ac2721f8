"""Functional: no operation writes to its operands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from adaptc.ir.example_inputs import example_sizes, example_tensors
from adaptc.ir.graph import Graph
from adaptc.ir.laws import nothing_is_written
from adaptc.ir.nodes import writes_in_place
from adaptc.rewriter.pipeline import Pass
from adaptc.tracing.export import dynamic_shapes, normalise, traceable


@dataclass(frozen=True)
class Functional(Pass):
    """x.mul_(y); f(x) becomes f(x * y), since an ONNX value is written once: torch traces the graph again."""

    name: ClassVar[str] = "functional"
    takes: ClassVar[frozenset[str]] = frozenset({"evaluated"})

    def call(self, graph: Graph) -> bool:
        """Trace the graph again where an operation writes to its operand."""
        if not any(writes_in_place(node.target) for node in graph.nodes):
            return False
        examples = example_tensors(graph.inputs, example_sizes(graph.inputs))
        shapes = dynamic_shapes(graph.inputs)
        module = fx.GraphModule(graph.module, graph.module.graph).eval()  # that can be run
        with traceable():
            program: Any = torch.export.export(module, (), examples, dynamic_shapes=shapes, strict=False)
            traced = normalise(program.run_decompositions({}).module(check_guards=False))
        graph.module.graph = traced.graph
        return True

    def ensures(self, graph: Graph) -> str | None:
        """No operation writes to a value."""
        return next((breach.message for breach in nothing_is_written(graph)), None)
