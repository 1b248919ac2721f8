"""Values of nodes by their shapes and dtypes: computed again where a rewrite has changed them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.node import map_arg

from adaptc.graph import VERIFIED, Graph, signature


def evaluated(node: fx.Node) -> Any:
    """What an operation gives on the recorded values of its operands; within the graph's own fake-tensor mode."""
    args, kwargs = map_arg((node.args, dict(node.kwargs)), _recorded)  # type: ignore[arg-type]
    return node.target(*args, **kwargs)  # type: ignore[operator]


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


def _recorded(node: fx.Node) -> Any:
    return False if node.target == "training" else node.meta["val"]
