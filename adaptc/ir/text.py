"""The text of a graph: a line a node, as `Graph.text` and error messages show it."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import fx

from adaptc.ir.nodes import CUT, is_operator, module_of


def line_of(node: fx.Node) -> str:
    """A node as text: `%mm = aten.mm.default(%x, %w)  float32[2, 3]  # layers.0`."""
    if node.op == "output":
        return f"return {_operand(node.args[0])}"
    shape = _shape(node.meta.get("val"))
    if node.op in ("placeholder", "get_attr"):
        kind = "input" if node.op == "placeholder" else "weight"
        return f"%{node.name} = {kind} {node.target}  {shape}".rstrip()
    target = node.target
    name = str(target) if is_operator(target) else getattr(target, "__name__", str(target))
    operands = [_operand(a) for a in node.args] + [f"{k}={_operand(v)}" for k, v in node.kwargs.items()]
    notes = [module_of(node)[0], "a segment ends" if node.meta.get(CUT) else ""]
    comment = ", ".join(note for note in notes if note)
    return f"%{node.name} = {name}({', '.join(operands)})  {shape}" + (f"  # {comment}" if comment else "")


def _operand(value: object) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_operand(item) for item in cast(list[Any], value)) + "]"
    return str(value)


def _shape(value: object) -> str:
    if not isinstance(value, torch.Tensor):
        return ""
    return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(str(size) for size in value.shape)}]"
