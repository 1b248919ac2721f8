"""Training mode as a node: one graph that follows `module.training`."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


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
        own_statistics = (
            node.target is aten.batch_norm.default and node.args[3] is None
        )  # the same in both modes
        return None if own_statistics else training_node(graph)
    if node.target is aten.add_.Tensor and argument == "other" and value is True:  # batch norm's counter
        return training_node(graph)
    if argument == "dropout_p" and isinstance(value, float) and value > 0:
        return scaled_by_training(graph, node, value)
    return None


def scaled_by_training(graph: fx.Graph, node: fx.Node, p: float) -> fx.Node:
    """A node before `node` that is `p` in training and 0 in evaluation."""
    flag = training_node(graph)
    with graph.inserting_before(node):
        return graph.call_function(operator.mul, (p, flag))
