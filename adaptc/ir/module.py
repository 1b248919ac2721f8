"""From a graph to a module: its weights are loaded, and segments of it are computed again for the gradient."""

from __future__ import annotations

import operator
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
import torch.utils.checkpoint
from torch import fx, nn

from adaptc.ir.conversion import ConvertedModule
from adaptc.ir.counted import counted_by, let_count
from adaptc.ir.graph import Graph
from adaptc.ir.nodes import CUT, copy_nodes, set_tensor, writes_in_place

# torch's checkpoint has no types.
_checkpoint: Callable[..., Any] = cast(Any, torch.utils.checkpoint).checkpoint
RUNNING_STATISTICS = frozenset({torch.ops.aten.batch_norm.default, torch.ops.aten.instance_norm.default})
"""Operations that write to running statistics, their fourth and fifth operand, without saying so in their schema."""


class Segment(nn.Module):
    """Some operations of a graph as a module of their own; its inputs are all that they read, weights too.

    Args:
        graph: the operations.
        written: which inputs are buffers that they write to, such as the running mean of a batch norm.
    """

    def __init__(self, graph: fx.Graph, written: Sequence[int] = ()):
        super().__init__()
        self.inner = fx.GraphModule(nn.Module(), graph)
        self.written = tuple(written)
        self.recomputes = True
        self.again = False

    def forward(self, *values: Any) -> Any:
        """Run the operations. In training their activations are dropped, and computed again for the gradient."""
        if self.recomputes and self.training and torch.is_grad_enabled():
            # a compiled module writes to its buffers once in any case
            if not self.written or torch.compiler.is_compiling():
                return _checkpoint(self.inner, *values, use_reentrant=False)
            return _checkpoint(self._run, *values, use_reentrant=False, context_fn=self._contexts)
        return self.inner(*values)

    def _run(self, *values: Any) -> Any:
        if self.again:  # buffers are updated once a batch: the second run writes to copies
            values = tuple(v.clone() if index in self.written else v for index, v in enumerate(values))
        return self.inner(*values)

    def _contexts(self) -> tuple[Any, Any]:
        """What torch enters for the first run, and for the second."""
        return nullcontext(), self._second_run()

    @contextmanager
    def _second_run(self) -> Generator[None, None, None]:
        self.again = True
        try:
            yield
        finally:
            self.again = False


def with_segments(module: fx.GraphModule, prefix: str = "") -> None:
    """Turn every segment of a module's graph, up to a node marked `CUT`, into a `Segment`, in place.

    The names of weights stay as they are. Operations after the last mark stay too: their gradients are computed first,
    so that dropping their activations would save nothing.

    Args:
        module: changed in place.
        prefix: of the names of its segments.
    """
    nodes = [node for node in module.graph.nodes if node.op == "call_function" and not _only_counts(node)]
    ends = [index for index, node in enumerate(nodes) if node.meta.get(CUT)]
    start = 0
    for number, end in enumerate(ends):
        _extract(module, nodes[start : end + 1], f"{prefix}segment_{number}")
        start = end + 1
    if ends:
        module.graph.lint()
        module.recompile()


def _extract(module: fx.GraphModule, nodes: Sequence[fx.Node], name: str) -> None:
    """Replace nodes by the call of a `Segment` under this name, and by those of its results that are read outside."""
    inside = set(nodes)
    inputs = list(dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in inside))
    outputs = [node for node in nodes if any(user not in inside for user in node.users)]
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {node: graph.placeholder(node.name) for node in inputs}
    for node in nodes:
        copied[node] = graph.node_copy(node, copied.__getitem__)
    graph.output(tuple(copied[node] for node in outputs))
    written = [index for index, node in enumerate(inputs) if any(_writes_to(user, node) for user in inside)]
    module.add_submodule(name, Segment(graph, written))
    with module.graph.inserting_after(nodes[-1]):
        called = module.graph.call_module(name, tuple(inputs))
    with module.graph.inserting_after(called):
        for index, node in reversed(list(enumerate(outputs))):
            result = module.graph.call_function(operator.getitem, (called, index))
            result.meta = dict(node.meta)
            node.replace_all_uses_with(result, delete_user_cb=lambda user: user not in inside)
    for node in reversed(nodes):
        module.graph.erase_node(node)


def _only_counts(node: fx.Node) -> bool:
    """Whether a node only updates a buffer, such as the number of batches seen: there is nothing to compute again."""
    return (
        writes_in_place(node.target)
        and not node.users
        and all(n.op == "get_attr" for n in node.all_input_nodes)
    )


def _writes_to(user: fx.Node, weight: fx.Node) -> bool:
    """Whether an operation writes to a weight or buffer that it reads."""
    if weight.op != "get_attr" or weight not in user.all_input_nodes:
        return False
    return (user.target in RUNNING_STATISTICS and weight in user.args[3:5]) or (
        writes_in_place(user.target) and user.args[0] is weight
    )


@contextmanager
def kept_activations(module: nn.Module) -> Generator[None, None, None]:
    """Let no segment of a module be computed again inside this block, so that a trace sees its operations."""
    segments = [part for part in module.modules() if isinstance(part, Segment)]
    for segment in segments:
        segment.recomputes = False
    try:
        yield
    finally:
        for segment in segments:
            segment.recomputes = True


def bind(
    graph: Graph,
    trainable: Iterable[str] = (),
    shared: Mapping[str, torch.Tensor] | None = None,
    prefix: str = "",
) -> fx.GraphModule:
    """Load the weights of a graph into a module of its own, under the base's names.

    A tensor with several names stays one tensor.

    Args:
        graph: is not changed.
        trainable: the names of the parameters that require gradients.
        shared: tensors of another module by name, which are taken as they are.
        prefix: of the names of segments.
    """
    trained = set(trainable)
    module = ConvertedModule(nn.Module(), fx.Graph())
    tensors: dict[str, torch.Tensor] = dict(shared or {})
    for name in graph.weights:
        first = graph.aliases.get(name, name)
        if first not in tensors:
            tensor = graph.weights[first].load()
            # Training changes buffers in place, and the user's model must not change: buffers are copied.
            is_buffer = first in graph.buffers
            tensor = tensor.clone() if is_buffer else nn.Parameter(tensor, requires_grad=first in trained)
            tensors[first] = tensor
        set_tensor(module, name, tensors[first], persistent=name not in graph.transient)
    module.graph = copy_nodes(graph.module.graph)
    with_segments(module, prefix)
    let_count(module, counted_by(graph.inputs))
    return module
