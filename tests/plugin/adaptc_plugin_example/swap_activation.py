"""A pass that adaptc does not have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from adaptc import Graph, Pass, graph_pass
from adaptc.errors import Refusal

aten = torch.ops.aten


@graph_pass("swap-activation")
@dataclass(frozen=True)
class SwapActivation(Pass):
    """relu(x) becomes gelu(x), or silu(x)."""

    to: str = "gelu"

    takes: ClassVar[frozenset[str]] = frozenset({"traced", "adapted"})
    changes_results: ClassVar[bool] = True

    def requires(self, graph: Graph) -> list[Refusal]:
        """There is a relu to replace."""
        if any(node.target is aten.relu.default for node in graph.nodes):
            return []
        return [Refusal("swap-activation: the model has no relu")]

    def call(self, graph: Graph) -> bool:
        """Rewrite every relu."""
        target = {"gelu": aten.gelu.default, "silu": aten.silu.default}[self.to]
        for node in [n for n in graph.nodes if n.target is aten.relu.default]:
            node.target = target
        return True

    def ensures(self, graph: Graph) -> str | None:
        """No relu is left."""
        left = [node.name for node in graph.nodes if node.target is aten.relu.default]
        return f"swap-activation left {', '.join(left)}" if left else None
