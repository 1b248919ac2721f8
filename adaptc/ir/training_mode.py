"""Training mode as a node: one graph that follows `module.training`."""

# An operation's schema has no public name.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import operator

import torch
from torch import fx

from adaptc.ir.nodes import is_operator

aten = torch.ops.aten


def training_node(graph: fx.Graph) -> fx.Node:
    """The node that reads `module.training`; inserted before all operations if there is none yet."""
    for node in graph.nodes:
        if node.op == "get_attr" and node.target == "training":
            return node
    first = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(first):
        return graph.create_node("get_attr", "training")


def mark_training_arguments(graph: fx.Graph) -> None:
    """Let the arguments that a trace in training mode fixes (`train`, `training`, `dropout_p`) follow the module."""
    for node in list(graph.nodes):
        if node.op != "call_function" or not is_operator(node.target):
            continue
        names = [argument.name for argument in node.target._schema.arguments]
        for index, (name, value) in enumerate(zip(names, node.args, strict=False)):
            follows = _following(graph, node, name, value)
            if follows is not None:
                node.update_arg(index, follows)
        for name, value in node.kwargs.items():
            follows = _following(graph, node, name, value)
            if follows is not None:
                node.update_kwarg(name, follows)


def _following(graph: fx.Graph, node: fx.Node, argument: str, value: object) -> fx.Node | None:
    """The node that takes the place of an argument which holds in training mode only; None if it holds in both."""
    if argument in ("train", "training") and value is True:
        # without running statistics a batch norm is the same in both modes
        stateless = node.target is aten.batch_norm.default and node.args[3] is None
        return None if stateless else training_node(graph)
    if node.target is aten.add_.Tensor and argument == "other" and value is True:  # batch norm's counter
        return training_node(graph)
    if argument == "dropout_p" and isinstance(value, float) and value > 0:
        return scaled_by_training(graph, node, value)
    return None


def scaled_by_training(graph: fx.Graph, node: fx.Node, p: float) -> fx.Node:
    """A new node, before `node`, whose value is `p` in training mode and 0 in evaluation mode."""
    flag = training_node(graph)
    with graph.inserting_before(node):
        return graph.call_function(operator.mul, (p, flag))
