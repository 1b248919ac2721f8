"""Branches and loops of torch's control-flow operations, inlined: a graph is a straight line of operations."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.node import map_arg

from adaptc.ir.nodes import provenance

aten = torch.ops.aten
higher_order: Any = torch.ops.higher_order
ADVICE: dict[Any, str] = {
    higher_order.cond: "a graph has no branches: both of torch.cond are computed and one is selected, which takes a "
    "tensor or the comparison of a size as the condition, and results of the same shapes",
    higher_order.scan: "a graph has no loops: write the size that scan runs over as a number, so that its steps are "
    "written out",
    higher_order.while_loop: "a graph has no loops: run the largest number of steps, and let torch.where keep each "
    "value once it is done",
}
"""Operation -> what to do where it cannot be inlined."""
COMPARED: dict[Any, Any] = {
    operator.gt: aten.gt.Tensor,
    operator.ge: aten.ge.Tensor,
    operator.lt: aten.lt.Tensor,
    operator.le: aten.le.Tensor,
    operator.eq: aten.eq.Tensor,
    operator.ne: aten.ne.Tensor,
}
"""The comparison of two sizes -> that of two tensors."""


def inline_control_flow(module: fx.GraphModule, weights: Mapping[int, str]) -> list[str]:
    """Inline the branches of `torch.cond`, one of which is selected, and the steps of `scan` over a fixed size.

    What cannot be inlined stays as it is.

    Args:
        module: an exported module.
        weights: identity of a weight, as it was while the module was traced -> its name.

    Returns:
        A note on every `torch.cond` that was inlined.
    """
    notes: list[str] = []
    for node in list(module.graph.nodes):
        if node.target is higher_order.cond:
            results = _selected(module, node, notes, weights)
            notes += [f"both branches of torch.cond are computed, and one is selected ({_at(node)})"] * bool(
                results
            )
        elif node.target is higher_order.scan:
            results = _written_out(module, node, notes, weights)
        else:
            continue
        if results is not None:
            _replace(module.graph, node, results)
    module.graph.eliminate_dead_code()
    return list(dict.fromkeys(notes))


def _replace(graph: fx.Graph, node: fx.Node, results: Sequence[fx.Node]) -> None:
    """Replace an operation by its results. One result may stand for itself, in no list."""
    for user in list(node.users):
        if user.target is operator.getitem:
            user.replace_all_uses_with(results[cast(int, user.args[1])])
            graph.erase_node(user)
    node.replace_all_uses_with(results[0])
    graph.erase_node(node)


def _at(node: fx.Node) -> str:
    return next(iter(provenance(node)), "torch")


def _body(
    module: fx.GraphModule, argument: object, notes: list[str], weights: Mapping[int, str]
) -> fx.Graph | None:
    """The graph that an argument names, without control flow of its own; None where some stays.

    It reads weights by their names in the module.
    """
    body = cast(fx.GraphModule, getattr(module, str(cast(fx.Node, argument).target)))
    notes += inline_control_flow(body, weights)
    for node in body.graph.nodes:
        if node.op == "get_attr":
            name = weights.get(id(getattr(body, str(node.target), None)))
            if name is None:
                return None
            node.target = name
    return body.graph


def _copied(graph: fx.Graph, body: fx.Graph, operands: Iterable[fx.Node]) -> list[fx.Node]:
    """Copy a body into a graph; its results."""
    weights = {str(node.target): node for node in graph.nodes if node.op == "get_attr"}
    inputs = [node for node in body.nodes if node.op == "placeholder"]
    copies = dict(zip(inputs, operands, strict=True))
    copies |= {n: weights[n.target] for n in body.nodes if n.op == "get_attr" and n.target in weights}
    results: Any = graph.graph_copy(body, copies)
    return list(cast(Sequence[Any], results)) if isinstance(results, (list, tuple)) else [results]


def _call(graph: fx.Graph, node: fx.Node, target: Any, *args: Any, **options: Any) -> fx.Node:
    """An operation in place of another node, with the value that it gives."""
    call = graph.call_function(target, args, options)
    operands: Any = map_arg(args, lambda n: n.meta["val"])
    values = [n.meta.get("val") for n in graph.nodes]
    mode = next(value.fake_mode for value in values if isinstance(value, FakeTensor))
    with mode, torch.no_grad():
        call.meta = {**node.meta, "val": target(*operands, **options)}
    return call


def _selected(
    module: fx.GraphModule, node: fx.Node, notes: list[str], weights: Mapping[int, str]
) -> Sequence[fx.Node] | None:
    """The results of both branches of a `torch.cond`, selected; None where its condition is no flag."""
    condition, *branches, operands = cast(Any, node.args)
    bodies = [_body(module, branch, notes, weights) for branch in branches]
    if not _is_flag(condition) or not _same_shapes(bodies):
        return None
    graph = module.graph
    with graph.inserting_before(node):
        results = [_copied(graph, cast(fx.Graph, body), operands) for body in bodies]
        flag = _flag(graph, node, condition)
        return [_call(graph, node, aten.where.self, flag, *pair) for pair in zip(*results, strict=True)]


def _is_flag(condition: object) -> bool:
    """Whether a condition is a tensor, or compares a size."""
    if not isinstance(condition, fx.Node):
        return False
    return isinstance(condition.meta["val"], torch.Tensor) or condition.target in COMPARED


def _flag(graph: fx.Graph, node: fx.Node, condition: fx.Node) -> fx.Node:
    """A condition as a boolean tensor without dimensions."""
    if isinstance(condition.meta["val"], torch.Tensor):
        return _call(graph, node, aten.reshape.default, condition, [])
    sizes = [
        _call(graph, node, aten.scalar_tensor.default, size, dtype=torch.int64) for size in condition.args
    ]
    return _call(graph, node, COMPARED[condition.target], *sizes)


def _same_shapes(bodies: Sequence[fx.Graph | None]) -> bool:
    """Whether all bodies are straight lines of operations that give tensors of the same shapes."""
    if None in bodies:
        return False
    outputs = [list(cast(fx.Graph, body).output_node().all_input_nodes) for body in bodies]
    shapes = [[str(value.meta["val"].shape) for value in values] for values in outputs]
    return shapes[0] == shapes[1]


def _written_out(
    module: fx.GraphModule, node: fx.Node, notes: list[str], weights: Mapping[int, str]
) -> Sequence[fx.Node] | None:
    """The last states and the stacked results of a `scan`, step by step; None where it runs over a dynamic size."""
    name, states, sequences, others = cast(Any, node.args)
    body, steps = _body(module, name, notes, weights), sequences[0].meta["val"].shape[0]
    if body is None or not isinstance(steps, int):
        return None
    graph, columns = module.graph, list[list[fx.Node]]()
    with graph.inserting_before(node):
        for step in range(steps):
            rows = [_call(graph, node, aten.select.int, sequence, 0, step) for sequence in sequences]
            results = _copied(graph, body, [*states, *rows, *others])
            states, given = results[: len(states)], results[len(states) :]
            columns.append(given)
        stacked = [
            _call(graph, node, aten.stack.default, list(column)) for column in zip(*columns, strict=True)
        ]
    return [*states, *stacked]
