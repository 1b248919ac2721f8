"""Nodes: what is read off a single node of a graph."""

from __future__ import annotations

import torch
from torch import fx


def operation(node: fx.Node) -> str:
    """The name of a node's operation, without namespace and overload: `conv2d`."""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target).split(".")[1]
    return getattr(node.target, "__name__", str(node.target))
