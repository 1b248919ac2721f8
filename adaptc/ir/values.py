"""The values of single nodes on given inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from adaptc.ir.graph import Graph
from adaptc.ir.nodes import apply_operation


class Values:
    """What nodes of a graph that only evaluates give on some inputs. Only what a node depends on is computed.

    Args:
        graph: the graph; the weights that a value depends on are loaded.
        inputs: the name of an input -> its tensor.
    """

    def __init__(self, graph: Graph, inputs: Mapping[str, torch.Tensor]):
        self.graph = graph
        specs = zip(graph.placeholders, graph.inputs, strict=True)
        self._values: dict[fx.Node, Any] = {node: inputs[spec.name] for node, spec in specs}

    def of(self, node: fx.Node) -> Any:
        """The value of a node."""
        if node not in self._values:
            if node.op == "get_attr":
                self._values[node] = self.graph.weights[str(node.target)].load()
            else:
                for operand in node.all_input_nodes:
                    self.of(operand)
                with torch.no_grad():
                    self._values[node] = apply_operation(node, self._values.__getitem__)
        return self._values[node]
