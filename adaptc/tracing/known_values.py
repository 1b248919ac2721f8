"""What a trace computes of constants alone, computed once and kept: no part of the program."""

from __future__ import annotations

from collections.abc import Container
from typing import Any, cast

import torch
from torch import fx

from adaptc.errors import TraceError
from adaptc.ir.nodes import (
    apply_operation,
    is_operator,
    map_operands,
    memory_owner,
    operation,
    provenance,
    returns_operand,
    written_operands,
)

aten = torch.ops.aten
NAME = "known_{}"
"""The names of what is kept."""


def keep_known(module: fx.GraphModule, weights: Container[str]) -> None:
    """Replace what is computed of constants alone by its value, in place.

    A selection by a mask that is known becomes one by positions: its size is no longer that of a mask's values.

    Args:
        module: an exported module.
        weights: the names of the model's own tensors, which are no constants.

    Raises:
        TraceError: a value changes after it was read, as one that is written in place may.
    """
    graph = module.graph
    values = _computed(module, weights)
    snapshots: dict[fx.Node, torch.Tensor] = {}
    for node in [node for node in graph.nodes if node not in values]:
        for operand in [each for each in node.all_input_nodes if each in values]:
            value = values[operand]
            if not isinstance(value, torch.Tensor):
                node.args, node.kwargs = _with(node, operand, value)
            elif operand.op != "get_attr":
                snapshots.setdefault(operand, value.clone())
    for operand, value in snapshots.items():
        if not torch.equal(value, cast(torch.Tensor, values[operand])):
            raise TraceError(
                f"a value that is computed of constants is written again after it was read: {operation(operand)}",
                *provenance(operand),
            )
        _keep(module, operand, value, values)
    for node in reversed([node for node in values if node.op == "call_function"]):
        if not node.users:
            graph.erase_node(node)


def _computed(module: fx.GraphModule, weights: Container[str]) -> dict[fx.Node, Any]:
    """The nodes that depend on constants alone, with their values; none that something else writes into."""
    unknown = set[fx.Node]()
    while True:
        values: dict[fx.Node, Any] = {}
        written: fx.Node | None = None
        for node in module.graph.nodes:
            operands = node.all_input_nodes
            if node.op == "get_attr":
                tensor: Any = getattr(module, str(node.target), None) if "." not in str(node.target) else None
                if node.target not in weights and type(tensor) is torch.Tensor:
                    values[node] = tensor.clone()
            elif node.op == "call_function" and operands and node not in unknown:
                if all(operand in values for operand in operands) and _is_fixed(node):
                    values[node] = apply_operation(node, values.get)
                    continue
                owners = [memory_owner(operand) for operand in written_operands(node)]
                written = next((owner for owner in owners if owner in values), None)
                if written is not None:
                    break
        if written is None:
            return values
        unknown |= _memory(written)


def _memory(owner: fx.Node) -> set[fx.Node]:
    """A value and all views of it."""
    views, rest = {owner}, [owner]
    while rest:
        for user in rest.pop().users:
            if returns_operand(user.target) and user not in views:
                views.add(user)
                rest.append(user)
    return views


def _is_fixed(node: fx.Node) -> bool:
    """Whether an operation gives the same in every call: it draws no random numbers and is no branch or loop."""
    if not is_operator(node.target):
        return getattr(node.target, "__module__", "") == "_operator"
    return torch.Tag.nondeterministic_seeded not in cast(Any, node.target).tags


def _with(node: fx.Node, operand: fx.Node, value: Any) -> tuple[Any, Any]:
    """The arguments of a node with a value in place of a node."""
    return map_operands(node, lambda leaf: value if leaf is operand else leaf)


def _keep(module: fx.GraphModule, operand: fx.Node, value: torch.Tensor, values: dict[fx.Node, Any]) -> None:
    """Let the readers of a value that are not known read the tensor that is kept."""
    readers = [user for user in operand.users if user not in values]
    masks = [user for user in readers if value.dtype == torch.bool and _selects_by(user, operand)]
    for user in masks:
        positions = [_held(module, operand, column) for column in value.nonzero().unbind(-1)]
        chosen: list[Any] = []
        for index in cast("list[Any]", user.args[1]):
            chosen += positions if index is operand else [index]
        user.update_arg(1, chosen)
    others = [user for user in readers if user not in masks]
    if others:
        node = _held(module, operand, value)
        for user in others:
            user.replace_input_with(operand, node)


def _selects_by(user: fx.Node, mask: fx.Node) -> bool:
    """Whether an operation selects by a mask among its indices."""
    indexing = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
    return user.target in indexing and mask in cast("list[Any]", user.args[1])


def _held(module: fx.GraphModule, operand: fx.Node, value: torch.Tensor) -> fx.Node:
    """A tensor that the module holds, read before the first node that reads the operand."""
    number = 0
    while hasattr(module, NAME.format(number)):
        number += 1
    name = NAME.format(number)
    module.register_buffer(name, value.detach().contiguous(), persistent=False)
    graph = module.graph
    with graph.inserting_before(operand):
        node = graph.get_attr(name)
    mode: Any = next(n.meta["val"].fake_mode for n in graph.nodes if n.op == "placeholder")
    node.meta = {**operand.meta, "val": mode.from_tensor(value, static_shapes=True)}
    return node
