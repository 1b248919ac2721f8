"""Nodes: what is read off a single node of a graph."""

from __future__ import annotations

import torch
from torch import fx


def operation(node: fx.Node) -> str:
    """The name of a node's operation, without namespace and overload: `conv2d`."""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target).split(".")[1]
    return getattr(node.target, "__name__", str(node.target))


def keeps_shape(node: fx.Node) -> bool:
    """Whether a node's value has the shape of its first operand, symbols included: a slice that takes all."""
    before = node.args[0]
    return isinstance(before, fx.Node) and str(before.meta["val"].shape) == str(node.meta["val"].shape)
