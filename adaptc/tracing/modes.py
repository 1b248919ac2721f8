"""Training mode as a node: one graph that follows `module.training`."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from adaptc.errors import TraceError
from adaptc.sites import source_of

aten = torch.ops.aten
IDENTITIES = {aten.contiguous.default, aten.clone.default, aten.alias.default}
"""Operations that a trace drops or keeps by memory layout, without a change of value."""


def training_node(graph: fx.Graph) -> fx.Node:
    """The node that reads `module.training`; made if there is none."""
    for node in graph.nodes:
        if node.op == "get_attr" and node.target == "training":
            return node
    first = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(first):
        return graph.create_node("get_attr", "training")


def mark_training_arguments(graph: fx.Graph) -> None:
    """Make what a trace in training mode fixed follow the module: `train=True`, `training=True`, `dropout_p=p`."""
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        for index, argument in enumerate(node.target._schema.arguments):
            keyword = argument.name in node.kwargs
            value = (
                node.kwargs.get(argument.name)
                if keyword
                else node.args[index]
                if index < len(node.args)
                else None
            )
            follows = _following(graph, node, argument.name, value)
            if follows is not None and keyword:
                node.update_kwarg(argument.name, follows)
            elif follows is not None:
                node.update_arg(index, follows)


def _following(graph: fx.Graph, node: fx.Node, argument: str, value: Any) -> fx.Node | None:
    if argument in ("train", "training") and value is True:
        return training_node(graph)
    if node.target is aten.add_.Tensor and argument == "other" and value is True:  # batch norm's counter
        return training_node(graph)
    if argument == "dropout_p" and isinstance(value, float) and value > 0:
        return _scaled_by_training(graph, node, value)
    return None


def _scaled_by_training(graph: fx.Graph, node: fx.Node, p: float) -> fx.Node:
    flag = training_node(graph)
    with graph.inserting_before(node):
        return graph.call_function(operator.mul, (p, flag))


def follow_training(graph: fx.Graph, training: fx.Graph) -> None:
    """Merge a trace in training mode into the trace in evaluation mode, in place.

    Where both differ in a literal, the literal becomes a node: `False`/`True` the module's `training`, `0`/`p`
    the product `p * training`. Dropout that only runs in training is inserted.

    Raises:
        TraceError: the model computes something else in training, beyond dropout and batch norm.
    """
    pairs: dict[fx.Node, fx.Node] = {}
    here = [n for n in graph.nodes if not _is_noise(n)]
    position = 0
    for theirs in training.nodes:
        if _is_noise(theirs):
            if theirs.op == "call_function":
                pairs[theirs] = pairs.get(theirs.args[0])  # type: ignore[assignment]
            continue
        ours = here[position] if position < len(here) else None
        if ours is not None and (theirs.op, theirs.target) == (ours.op, ours.target):
            pairs[theirs] = ours
            position += 1
            _merge(graph, theirs, ours, pairs)
        elif theirs.target is aten.dropout.default and ours is not None:
            pairs[theirs] = _insert_dropout(graph, theirs, pairs[theirs.args[0]], ours)  # type: ignore[index]
        elif _updates_buffer(theirs) and ours is not None:
            _insert_update(graph, theirs, ours)
        else:
            _differs(theirs)
    if position < len(here):
        _differs(here[position])
    graph.lint()


def _is_noise(node: fx.Node) -> bool:
    if node.op == "get_attr":
        return True
    return node.target in IDENTITIES


def _merge(graph: fx.Graph, theirs: fx.Node, ours: fx.Node, pairs: dict[fx.Node, fx.Node]) -> None:
    if ours.op not in ("call_function", "output"):
        return
    width = max(len(theirs.args), len(ours.args))
    ours.args = tuple(
        _merge_value(graph, ours, _argument(ours, index), _argument(theirs, index), pairs)
        for index in range(width)
    )
    ours.kwargs = {
        key: _merge_value(graph, ours, ours.kwargs.get(key), theirs.kwargs.get(key), pairs)
        for key in {**ours.kwargs, **theirs.kwargs}
    }


def _argument(node: fx.Node, index: int) -> Any:
    if index < len(node.args):
        return node.args[index]
    return node.target._schema.arguments[index].default_value  # type: ignore[union-attr]


def _merge_value(
    graph: fx.Graph, node: fx.Node, ours: Any, theirs: Any, pairs: dict[fx.Node, fx.Node]
) -> Any:
    if isinstance(ours, fx.Node) and isinstance(theirs, fx.Node):
        mapped = pairs.get(theirs)
        return mapped if mapped is not None and mapped.meta.get("inserted_dropout") else ours
    if isinstance(ours, (list, tuple)) and isinstance(theirs, (list, tuple)) and len(ours) == len(theirs):
        return type(ours)(_merge_value(graph, node, a, b, pairs) for a, b in zip(ours, theirs, strict=True))  # type: ignore[call-arg]
    if type(ours) is type(theirs) and ours == theirs:
        return ours
    if ours is False and theirs is True:
        return training_node(graph)
    if ours == 0 and isinstance(theirs, float):
        return _scaled_by_training(graph, node, theirs)
    return _differs(node)


def _insert_dropout(graph: fx.Graph, theirs: fx.Node, source: fx.Node, before: fx.Node) -> fx.Node:
    flag = training_node(graph)
    with graph.inserting_before(before):
        node = graph.call_function(aten.dropout.default, (source, theirs.args[1], flag))
    node.meta = {k: v for k, v in theirs.meta.items() if k in ("nn_module_stack", "stack_trace")}
    node.meta |= {"val": source.meta["val"], "inserted_dropout": True}
    return node


def _updates_buffer(node: fx.Node) -> bool:
    return (
        node.target is aten.add_.Tensor
        and isinstance(node.args[0], fx.Node)
        and node.args[0].op == "get_attr"
    )


def _insert_update(graph: fx.Graph, theirs: fx.Node, before: fx.Node) -> None:
    buffer = theirs.args[0]
    assert isinstance(buffer, fx.Node)
    flag = training_node(graph)
    with graph.inserting_before(before):
        ours = graph.get_attr(str(buffer.target))
        ours.meta["val"] = buffer.meta["val"]
        graph.call_function(aten.add_.Tensor, (ours, flag))


def _differs(node: fx.Node) -> Any:
    raise TraceError(
        f"the model computes differently in training, beyond dropout and batch norm: {node.format_node()}\n"
        f"  at {source_of(node) or 'an unknown source line'}\n"
        "  adaptc makes one graph for both modes; move that difference out of forward, or fix it by an argument"
    )
