"""Segments of a bound module that are computed again for the gradient, in place of being kept."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from adaptc.ir.graph import Graph
from adaptc.ir.nodes import CUT, copy_nodes, set_tensor, writes_in_place

LEARNING = frozenset({torch.ops.aten.batch_norm.default, torch.ops.aten.instance_norm.default})
"""Operations whose fourth and fifth operand are running statistics."""


class Segment(nn.Module):
    """Some operations of a graph, without the weights that they read: those are given.

    Args:
        graph: the operations.
        learns: which inputs are buffers that they write to, such as the running mean of a batch norm.
    """

    def __init__(self, graph: fx.Graph, learns: Sequence[int] = ()):
        super().__init__()
        self.inner = fx.GraphModule(nn.Module(), graph)
        self.learns = tuple(learns)
        self.recomputes = True
        self.again = False

    def forward(self, *values: Any) -> Any:
        """Compute; where there will be a gradient, forget what it needs and compute again."""
        if self.recomputes and self.training and torch.is_grad_enabled():
            if not self.learns or torch.compiler.is_compiling():  # which writes to buffers once in any case
                return checkpoint(self.inner, *values, use_reentrant=False)
            return checkpoint(self._run, *values, use_reentrant=False, context_fn=self._contexts)
        return self.inner(*values)

    def _run(self, *values: Any) -> Any:
        if self.again:  # what is learnt from a batch is learnt once
            values = tuple(v.clone() if index in self.learns else v for index, v in enumerate(values))
        return self.inner(*values)

    def _contexts(self) -> tuple[Any, Any]:
        return nullcontext(), self._once_more()

    @contextmanager
    def _once_more(self) -> Iterator[None]:
        self.again = True
        try:
            yield
        finally:
            self.again = False


def with_segments(module: fx.GraphModule) -> None:
    """Let every segment of a module's graph be a module of its own, in place. Names of weights stay as they are.

    What stands behind the last end is left as it is: its gradient comes first.
    """
    nodes = [node for node in module.graph.nodes if node.op == "call_function" and not _counts(node)]
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
    learns = [index for index, node in enumerate(given) if any(_learns(user, node) for user in inside)]
    module.add_submodule(name, Segment(graph, learns))
    with module.graph.inserting_after(nodes[-1]):
        called = module.graph.call_module(name, tuple(given))
    with module.graph.inserting_after(called):
        for index, node in reversed(list(enumerate(kept))):
            result = module.graph.call_function(operator.getitem, (called, index))
            result.meta = dict(node.meta)
            node.replace_all_uses_with(result, delete_user_cb=lambda user: user not in inside)
    for node in reversed(nodes):
        module.graph.erase_node(node)


def _counts(node: fx.Node) -> bool:
    """Whether it changes a buffer by itself, such as the number of batches seen: nothing to compute again."""
    return (
        writes_in_place(node.target)
        and not node.users
        and all(n.op == "get_attr" for n in node.all_input_nodes)
    )


def _learns(user: fx.Node, read: fx.Node) -> bool:
    """Whether an operation writes to what it reads here: torch says so of all but norms over a batch."""
    if read.op != "get_attr" or read not in user.all_input_nodes:
        return False
    return (user.target in LEARNING and read in user.args[3:5]) or (
        writes_in_place(user.target) and user.args[0] is read
    )


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


def bind(graph: Graph, trainable: Iterable[str] = ()) -> fx.GraphModule:
    """Materialise a graph: a plain module that owns its weights under the base's own names.

    Tensors with several names stay one tensor. Only `trainable` parameters require grad.
    """
    wanted = set(trainable)
    module = fx.GraphModule(nn.Module(), fx.Graph())
    made: dict[str, torch.Tensor] = {}
    for name in graph.weights:
        first = graph.aliases.get(name, name)
        if first not in made:
            tensor = graph.weights[first].load()
            # Training changes buffers in place, and those of the user's module are theirs.
            owned = first in graph.buffers
            tensor = tensor.clone() if owned else nn.Parameter(tensor, requires_grad=first in wanted)
            made[first] = tensor
        set_tensor(module, name, made[first], persistent=name not in graph.transient)
    module.graph = copy_nodes(graph.module.graph)
    with_segments(module)
    return module
