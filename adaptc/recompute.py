"""Segments of a bound module that are computed again for the gradient, in place of being kept."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

CUT = "cut"
"""The key in a node's meta that says that a segment ends there."""


class Segment(nn.Module):
    """Some operations of a graph, without the weights that they read: those are given."""

    def __init__(self, graph: fx.Graph):
        super().__init__()
        self.inner = fx.GraphModule(nn.Module(), graph)
        self.recomputes = True

    def forward(self, *values: Any) -> Any:
        """Compute; where there will be a gradient, forget what it needs and compute again."""
        if self.recomputes and self.training and torch.is_grad_enabled():
            return checkpoint(self.inner, *values, use_reentrant=False)
        return self.inner(*values)


def with_segments(module: fx.GraphModule) -> None:
    """Let every segment of a module's graph be a module of its own, in place. Names of weights stay as they are.

    What stands behind the last end is left as it is: its gradient comes first.
    """
    nodes = [node for node in module.graph.nodes if node.op == "call_function"]
    ends = [index for index, node in enumerate(nodes) if node.meta.get(CUT)]
    start = 0
    for number, end in enumerate(ends):
        _extract(module, nodes[start : end + 1], f"segment_{number}")
        start = end + 1
    if ends:
        module.graph.lint()
        module.recompile()


def _extract(module: fx.GraphModule, nodes: Sequence[fx.Node], name: str) -> None:
    inside = set(nodes)
    given = list(dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in inside))
    kept = [node for node in nodes if any(user not in inside for user in node.users)]
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {node: graph.placeholder(node.name) for node in given}
    for node in nodes:
        copied[node] = graph.node_copy(node, copied.__getitem__)
    graph.output(tuple(copied[node] for node in kept))
    module.add_submodule(name, Segment(graph))
    with module.graph.inserting_after(nodes[-1]):
        called = module.graph.call_module(name, tuple(given))
    with module.graph.inserting_after(called):
        for index, node in reversed(list(enumerate(kept))):
            result = module.graph.call_function(operator.getitem, (called, index))
            result.meta = dict(node.meta)
            node.replace_all_uses_with(result, delete_user_cb=lambda user: user not in inside)
    for node in reversed(nodes):
        module.graph.erase_node(node)


@contextmanager
def kept_activations(module: nn.Module) -> Iterator[None]:
    """Nothing is computed again for a while: what traces a module sees its operations."""
    segments = [part for part in module.modules() if isinstance(part, Segment)]
    for segment in segments:
        segment.recomputes = False
    try:
        yield
    finally:
        for segment in segments:
            segment.recomputes = True
