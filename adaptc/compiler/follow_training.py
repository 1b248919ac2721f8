"""The traced graph in both modes: what the trainable module starts from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from adaptc.ir.graph import Graph
from adaptc.rewriter.pipeline import Pass
from adaptc.tracing.merge_training import follow_training


@dataclass(frozen=True)
class FollowTraining(Pass):
    """Two traces of a model, one in each mode, become one graph that reads the module's mode.

    In evaluation mode the graph computes what it did before.

    Attributes:
        training: the trace in training mode. Merging consumes it.
    """

    training: fx.GraphModule

    name: ClassVar[str] = "follow-training"
    takes: ClassVar[frozenset[str]] = frozenset({"traced"})

    def call(self, graph: Graph) -> bool:
        """Merge the trace in training mode into the graph.

        Raises:
            TraceError: the model computes something else in training than dropout and the like.
        """
        before = graph.text()
        follow_training(graph.module, self.training)
        return graph.text() != before
