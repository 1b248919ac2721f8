"""Values of nodes by their shapes and dtypes: computed again where a rewrite has changed them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher

from adaptc.errors import VerifyError
from adaptc.ir.graph import Graph
from adaptc.ir.nodes import VERIFIED, evaluated, provenance, signature
from adaptc.ir.stages import stages_of


def refresh(graph: Graph) -> None:
    """Record the value of every operation anew whose operands have new ones, up to where the shapes are as before."""
    with graph.fake_mode, enable_python_dispatcher(), torch.no_grad():
        for node in graph.nodes:
            if node.op != "call_function" or node.meta.get(VERIFIED) == signature(node):
                continue
            value, before = evaluated(node), node.meta.get("val")
            if _described(value) != _described(before) or before is None:
                node.meta["val"] = value
            node.meta[VERIFIED] = signature(node)


def _described(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return str(value.dtype), str(list(value.shape)), str(value.stride())
    if isinstance(value, (list, tuple)):
        return [_described(item) for item in value]
    return str(value)


def verify(graph: Graph) -> None:
    """Check a graph against the tables of its stage.

    At every stage: the structure holds, every name is a weight of the right shape, and shapes and dtypes propagate
    to what is recorded. Besides, operations and laws are those that `stages.TABLE` declares for it.

    Raises:
        VerifyError: one of these does not hold; quotes the node and its source line.
    """
    with structure_checked():
        graph.module.graph.lint()
    stages = stages_of(graph)
    for node in graph.nodes:
        if node.op == "get_attr":
            _check_weight(graph, node)
        elif node.op not in ("placeholder", "output", "call_function"):
            raise _error(f"{node.op} is not allowed in a graph: {node.format_node()}", node)
        elif node.op == "call_function" and not any(stage.allows(node.target) for stage in stages.values()):
            raise _error(f"{_unregistered(node, stages)}: {node.format_node()}", node)
    for stage in stages.values():
        for breach in (breach for law in stage.laws for breach in law(graph)):
            raise _error(breach.message, breach.node)
    _propagate(graph)


@contextmanager
def structure_checked() -> Iterator[None]:
    """Let what torch says of a broken graph, such as of an operand behind its user, be an error that names the node.

    Raises:
        VerifyError: torch said so.
    """
    try:
        yield
    except RuntimeError as error:  # torch's words end with the text of all of the graph
        message = str(error).splitlines()[0]
        found = re.search(r"of Node '(\w+)'", message)
        raise VerifyError(message, node=found[1] if found else None) from error


def _check_weight(graph: Graph, node: fx.Node) -> None:
    if node.target == "training":
        return
    weight, value = graph.weights.get(str(node.target)), node.meta["val"]
    if weight is None:
        raise VerifyError(f"{node.target} is read, but there is no weight of that name", node=node.name)
    if tuple(value.shape) != weight.shape or value.dtype != weight.dtype:
        raise VerifyError(
            f"{node.target} is {list(weight.shape)}, but the graph takes it as {value}", node=node.name
        )


def _unregistered(node: fx.Node, stages: dict[str, Any]) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return f"not legal in a graph that is {' and '.join(stages)}"
    return "not a registered operation"


def _propagate(graph: Graph) -> None:
    """Run every operation that is new, or has new operands, on fake tensors and compare with what is recorded."""
    # Some operations need the dispatcher for symbolic sizes.
    with graph.fake_mode, enable_python_dispatcher(), torch.no_grad():
        for node in graph.nodes:
            if node.op != "call_function" or node.meta.get(VERIFIED) == signature(node):
                continue
            try:
                value = evaluated(node)
            except Exception as error:
                raise _error(f"{node.format_node()} does not fit its operands: {error}", node) from error
            recorded = node.meta.setdefault("val", value)
            if isinstance(recorded, torch.Tensor) and _differ(value, recorded):
                raise _error(f"{node.format_node()} gives {value}, but the graph records {recorded}", node)
            node.meta[VERIFIED] = signature(node)


def _differ(value: Any, recorded: torch.Tensor) -> bool:
    if not isinstance(value, torch.Tensor) or value.dtype != recorded.dtype or value.dim() != recorded.dim():
        return True
    pairs = zip(value.shape, recorded.shape, strict=True)
    return any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in pairs)


def _error(message: str, node: fx.Node | None) -> VerifyError:
    """The message, and where in the model the node comes from."""
    if node is None:
        return VerifyError(message)
    return VerifyError(message, *provenance(node), node=node.name)
