"""Whether a trace is what a model computes at another size too, though a condition of the trace fails there."""

# torch gives the expression of a symbolic size under a private name only.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

aten = torch.ops.aten


def is_same_trace(
    model: nn.Module,
    program: torch.export.ExportedProgram,
    examples: Mapping[str, Any],
    sizes: Mapping[Any, int],
) -> bool:
    """Whether a model runs the operations of its trace at other sizes, on the same values and numbers.

    A condition of torch's own, such as whether a tensor lies contiguous, need not change what is computed.

    Args:
        model: the model.
        program: its trace, with symbols for the sizes.
        examples: inputs of the other sizes; their values do not matter.
        sizes: symbol -> the other size.
    """
    try:
        fixed = torch.export.export(model, (), dict(examples), strict=False)
    except Exception:  # whatever the model raises there: not the trace
        return False
    ours, theirs = _steps(program.graph, sizes), _steps(fixed.graph, {})
    return ours == theirs


def _steps(graph: fx.Graph, sizes: Mapping[Any, int]) -> list[tuple[str, list[Any]]]:
    """The operations on tensors, and the output, each with its arguments: neither sizes nor assertions."""
    places: dict[fx.Node, int] = {}
    steps: list[tuple[str, list[Any]]] = []
    for node in graph.nodes:
        if node.op != "output" and not _is_tensor(node.meta.get("val")):
            continue
        if node.target is aten.alias.default or _takes_all(node, sizes):
            places[node] = places[node.args[0]]
            continue
        places[node] = len(steps)
        arguments = [] if node.op == "placeholder" else pytree.tree_leaves((node.args, dict(node.kwargs)))
        if node.target is aten.slice.Tensor and len(node.args) > 2 and node.args[2] is None:
            arguments[2] = 0
        steps.append((str(node.target), [_argument(leaf, places, sizes) for leaf in arguments]))
    return steps


def _is_tensor(value: object) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value))


def _takes_all(node: fx.Node, sizes: Mapping[Any, int]) -> bool:
    """Whether a slice takes all of a tensor; torch gives the tensor itself where it knows the size."""
    if node.target is not aten.slice.Tensor:
        return False
    shapes = [
        [_number(size, sizes) for size in each.meta["val"].shape] for each in (node, node.all_input_nodes[0])
    ]
    return shapes[0] == shapes[1]


def _argument(leaf: Any, places: Mapping[fx.Node, int], sizes: Mapping[Any, int]) -> Any:
    """A tensor's place; a size's number; any other argument as it is."""
    if not isinstance(leaf, fx.Node):
        return leaf
    return ("tensor", places[leaf]) if leaf in places else _number(leaf.meta.get("val"), sizes)


def _number(value: Any, sizes: Mapping[Any, int]) -> Any:
    """A size as a number, where it follows from the sizes of the inputs."""
    if not isinstance(value, torch.SymInt):
        return value
    expression = cast(Any, value).node.expr.subs(sizes)
    return int(expression) if expression.is_Integer else str(expression)
