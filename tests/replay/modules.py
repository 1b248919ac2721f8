"""Torch modules as text, and their tensors."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn


def graph_text(text: str) -> str:
    """The text of a graph without the modules that its nodes come from; names that follow from others are left out."""
    text = re.sub(r"  # ([\w.]+)$", "", text, flags=re.MULTILINE)
    return re.sub(r"^%(\w+) = weight (\S+)", _weight, text, flags=re.MULTILINE)


def module_text(module: fx.GraphModule) -> str:
    """A module's graph as the text of a graph is: a line a node."""
    names = {node: node.name for node in module.graph.nodes}
    return graph_text("\n".join(_node(node, names) for node in module.graph.nodes))


def renamed_text(module: fx.GraphModule) -> str:
    """A module's graph whatever its nodes are called: weights by their names, in order, and the rest by number."""
    weights = [node for node in module.graph.nodes if node.op == "get_attr"]
    rest = [node for node in module.graph.nodes if node.op != "get_attr"]
    names = {node: str(node.target) for node in weights} | {node: str(i) for i, node in enumerate(rest)}
    return "\n".join(
        [*sorted(_node(node, names) for node in weights), *(_node(node, names) for node in rest)]
    )


def program_text(loaded: fx.GraphModule, module: fx.GraphModule) -> str:
    """How a loaded program differs from the module it was made of: its operations, and a hash of all it says."""
    text = renamed_text(loaded)
    if text == renamed_text(module):
        return "the program of the module"
    before, after = (re.sub(r"%\d+\b", "%", renamed_text(m)).splitlines() for m in (module, loaded))
    changes = list(difflib.unified_diff(before, after, "the module", "its program", n=0, lineterm=""))
    return "\n".join([f"sha256 {hashlib.sha256(_sized(text).encode()).hexdigest()}", *changes])


def module_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer by each of its names."""
    tensors = dict(module.named_parameters(remove_duplicate=False))
    return {**tensors, **dict(module.named_buffers(remove_duplicate=False))}


def _sized(text: str) -> str:
    """Without torch's own names of dimensions."""
    return re.sub(r"\bs\d+\b", "size", text)


def _weight(match: re.Match[str]) -> str:
    name, target = match.groups()
    letters = target.replace(".", "").replace("_", "").lower()
    return f"weight {target}" if name.replace("_", "") == letters else match[0]


def _node(node: fx.Node, names: Mapping[fx.Node, str]) -> str:
    value = node.meta.get("val")
    shape = ""
    if isinstance(value, torch.Tensor):
        shape = f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
    if node.op in ("placeholder", "get_attr"):
        kind = "input" if node.op == "placeholder" else "weight"
        return f"%{names[node]} = {kind} {node.target}  {shape}".rstrip()
    operands = [_operand(a, names) for a in node.args]
    operands += [f"{k}={_operand(v, names)}" for k, v in node.kwargs.items()]
    if node.op == "output":
        return f"return {', '.join(operands)}"
    target = node.target if isinstance(node.target, str) else _name(node.target)
    return f"%{names[node]} = {target}({', '.join(operands)})  {shape}"


def _name(target: Any) -> str:
    return (
        str(target) if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", str(target))
    )


def _operand(value: Any, names: Mapping[fx.Node, str]) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(_operand(item, names) for item in value)}]"
    return f"%{names[value]}" if isinstance(value, fx.Node) else str(value)
