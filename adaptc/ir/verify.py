"""Checks of a graph after a rewrite: structure, weights, what is legal at its stage, shapes and dtypes."""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher

from adaptc.errors import VerifyError
from adaptc.ir.graph import Graph
from adaptc.ir.nodes import VERIFIED, evaluated, is_operator, provenance, signature
from adaptc.ir.shape_rules import shape_rules
from adaptc.ir.stages import Stage, stages_of


def refresh(graph: Graph) -> None:
    """Compute the recorded value of every operation again whose operands have new values, for a rewrite of shapes.

    A value that is as before (dtype, shape, strides) is kept, so that nothing downstream of it is computed again.
    """
    with _evaluating(graph):
        for node in graph.nodes:
            if node.op != "call_function" or node.meta.get(VERIFIED) == signature(node):
                continue
            value, recorded = evaluated(node), node.meta.get("val")
            if recorded is None or _description(value) != _description(recorded):
                node.meta["val"] = value
            node.meta[VERIFIED] = signature(node)


def evaluate_again(graph: Graph, node: fx.Node) -> None:
    """Compute the recorded value of one operation again, whose operands have new values."""
    with _evaluating(graph):
        node.meta["val"] = evaluated(node)
    node.meta[VERIFIED] = signature(node)


@contextmanager
def _evaluating(graph: Graph) -> Generator[None]:
    """Evaluate operations on fake tensors; new symbols, for the size of a selection by a mask, belong to no value."""
    symbols = graph.fake_mode.shape_env.ignore_fresh_unbacked_symbols()
    # Some operations need the dispatcher for symbolic sizes.
    with graph.fake_mode, symbols, enable_python_dispatcher(), shape_rules(), torch.no_grad():
        yield


def _description(value: object) -> Any:
    """Dtype, shape and strides of a tensor as text; of a list that of its items; else the value as text."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), str(list(value.shape)), str(value.stride())
    if isinstance(value, (list, tuple)):
        return [_description(item) for item in cast(list[Any], value)]
    return str(value)


def verify(graph: Graph) -> None:
    """Check that a graph is legal at its stage.

    At every stage the structure is sound, every name is that of a weight with this shape and dtype, and every operation
    gives the recorded shape and dtype. Which operations and laws hold besides is in `stages.STAGE_TABLE`.

    Raises:
        VerifyError: one of these does not hold; it quotes the node, its module and source line.
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
def structure_checked() -> Generator[None, None, None]:
    """Turn torch's error on a broken graph, such as an operand that comes after its user, into one that names the node.

    Raises:
        VerifyError: the block raised torch's error.
    """
    try:
        yield
    except RuntimeError as error:  # torch's message ends with the text of the whole graph
        message = str(error).splitlines()[0]
        name = re.search(r"of Node '(\w+)'", message)
        raise VerifyError(message, node=name[1] if name else None) from error


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


def _unregistered(node: fx.Node, stages: dict[str, Stage]) -> str:
    if is_operator(node.target):
        return f"not legal in a graph that is {' and '.join(stages)}"
    return "not a registered operation"


def _propagate(graph: Graph) -> None:
    """Run every operation that is new, or has new operands, on fake tensors and compare with the recorded value."""
    with _evaluating(graph):
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


def _differ(value: object, recorded: torch.Tensor) -> bool:
    if not isinstance(value, torch.Tensor) or value.dtype != recorded.dtype or value.dim() != recorded.dim():
        return True
    shapes = cast(Any, value).shape, cast(Any, recorded).shape
    # Symbolic sizes are not compared: two formulas can be equal.
    return any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in zip(*shapes, strict=True))


def _error(message: str, node: fx.Node | None) -> VerifyError:
    """The error, with a note on where in the model the node comes from."""
    if node is None:
        return VerifyError(message)
    return VerifyError(message, *provenance(node), node=node.name)
