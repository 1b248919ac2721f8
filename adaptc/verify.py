"""What is legal at each stage: checked after every pass, always."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher

from adaptc.errors import VerifyError
from adaptc.graph import VERIFIED, Graph, signature
from adaptc.shapes import evaluated
from adaptc.sites import place_of

PYTHON_FUNCTIONS: frozenset[Callable[..., Any]] = frozenset(
    {
        getattr,
        operator.getitem,
        operator.add,
        operator.sub,
        operator.mul,
        operator.floordiv,
        operator.truediv,
        operator.mod,
        operator.neg,
        operator.eq,
        operator.ne,
        operator.lt,
        operator.le,
        operator.gt,
        operator.ge,
        operator.pow,
        torch.sym_max,
        torch.sym_min,
        torch.sym_float,
        torch.sym_int,
        torch.sym_not,
        torch.sym_sum,
        torch.sym_ite,
    }
)
"""Functions on sizes, flags and devices that may stand beside operations on tensors."""


def verify(graph: Graph) -> None:
    """Check a graph against its stage's table.

    All stages: the structure holds, every operation is a registered one, every name is a weight of the right
    shape, and shapes and dtypes propagate to the recorded outputs. `adapted`, `factored`: every inserted
    parameter is read. `folded`: none is, and no operation on weights alone is left of them.

    Raises:
        VerifyError: one of these does not hold; quotes the node and its source line.
    """
    graph.module.graph.lint()
    for node in graph.nodes:
        _check_node(graph, node)
    inserted = set(graph.inserted)
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    left = {
        name
        for a in graph.adaptations
        if a.on_alias != "live" and not a.stays
        for name, _ in a.params.values()
    }
    if graph.stage == "folded" and left:
        raise VerifyError(f"the folded graph still holds the adapters {', '.join(sorted(left))}")
    if graph.stage in ("adapted", "factored") and not inserted <= read:
        raise VerifyError(f"inserted, but not read by any operation: {', '.join(sorted(inserted - read))}")
    _propagate(graph)


def _check_node(graph: Graph, node: fx.Node) -> None:
    if node.op in ("placeholder", "output"):
        return
    if node.op == "get_attr":
        if node.target == "training":
            return
        weight = graph.weights.get(str(node.target))
        if weight is None:
            raise VerifyError(f"{node.target} is read, but there is no weight of that name")
        if tuple(node.meta["val"].shape) != weight.shape or node.meta["val"].dtype != weight.dtype:
            raise VerifyError(
                f"{node.target} is {list(weight.shape)}, but the graph takes it as {node.meta['val']}"
            )
    elif node.op != "call_function":
        raise VerifyError(f"{node.op} is not allowed in a graph: {node.format_node()}")
    elif not isinstance(node.target, torch._ops.OpOverload) and node.target not in PYTHON_FUNCTIONS:
        raise VerifyError(f"not a registered operation: {node.format_node()}{place_of(node)}")


def _propagate(graph: Graph) -> None:
    """Run every operation that is new, or has new operands, on fake tensors and compare with what is recorded."""
    with (
        graph.fake_mode,
        enable_python_dispatcher(),
        torch.no_grad(),
    ):  # some operations need it for symbolic sizes
        for node in graph.nodes:
            if node.op != "call_function" or node.meta.get(VERIFIED) == signature(node):
                continue
            try:
                value = evaluated(node)
            except Exception as error:
                raise VerifyError(
                    f"{node.format_node()} does not fit its operands: {error}{place_of(node)}"
                ) from error
            recorded = node.meta.setdefault("val", value)
            if isinstance(recorded, torch.Tensor) and _differ(value, recorded):
                raise VerifyError(
                    f"{node.format_node()} gives {value}, but the graph records {recorded}{place_of(node)}"
                )
            node.meta[VERIFIED] = signature(node)


def _differ(value: Any, recorded: torch.Tensor) -> bool:
    if not isinstance(value, torch.Tensor) or value.dtype != recorded.dtype or value.dim() != recorded.dim():
        return True
    pairs = zip(value.shape, recorded.shape, strict=True)
    return any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in pairs)
