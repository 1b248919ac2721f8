"""State: what a call of a model leaves behind in its buffers and attributes. A graph and its programs have none."""

# torch has no public way to replace a module's buffers.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from adaptc.ir.nodes import memory_owner, module_of, source_of, written_operands

STATISTICS: dict[Any, int] = {torch.ops.aten.batch_norm.default: 5, torch.ops.aten.instance_norm.default: 5}
"""Operations that write to their running statistics, the fourth and fifth operand, without saying so in their schema ->
the position of the operand that says whether they do."""


def written_weights(nodes: Iterable[fx.Node]) -> dict[str, fx.Node]:
    """The weights, buffers and constants that a graph writes to, through views too.

    Returns:
        name -> the first node that writes to it.
    """
    written: dict[str, fx.Node] = {}
    for node in nodes:
        operands = written_operands(node)
        if node.target in STATISTICS and node.args[STATISTICS[node.target]] is True:
            operands += [value for value in node.args[3:5] if isinstance(value, fx.Node)]
        for operand in operands:
            owner = memory_owner(operand)
            if owner.op == "get_attr":
                written.setdefault(str(owner.target), node)
    return written


@contextmanager
def restored(model: nn.Module) -> Generator[None]:
    """Give every attribute of a module's parts that is assigned in this block its earlier value again.

    Lists and dicts have their earlier items, and tensors that are no parameters and no buffers their values.
    """
    attributes = [(part.__dict__, dict(part.__dict__)) for part in model.modules()]
    containers = (list, dict)
    values_of = [value for _, earlier in attributes for value in earlier.values()]
    held: list[Any] = [value for value in values_of if isinstance(value, containers)]
    items: list[tuple[Any, Any]] = [(value, value.copy()) for value in held]
    tensors = [
        value for value in pytree.tree_leaves([earlier for _, earlier in attributes]) if _is_plain(value)
    ]
    values = [(tensor, tensor._version, tensor.clone()) for tensor in tensors]
    try:
        yield
    finally:
        for current, earlier in cast("list[tuple[Any, Any]]", [*items, *attributes]):
            current.clear()
            fill: Any = getattr(current, "extend" if isinstance(current, list) else "update")
            fill(earlier)
        with torch.no_grad():
            for tensor, version, value in values:
                if tensor._version != version:
                    tensor.copy_(value)


def _is_plain(value: object) -> bool:
    """Whether an attribute is a tensor that no trace replaces: torch.export writes to such a one itself."""
    if not isinstance(value, torch.Tensor) or isinstance(value, (nn.Parameter, FakeTensor)):
        return False
    return not value.is_inference()  # nothing may write to such a one


def numbers_of(model: nn.Module) -> dict[str, float]:
    """Name -> value, for every attribute of a module's parts that is a number."""
    return {
        f"{name}.{key}".lstrip("."): value
        for name, part in cast("Iterable[tuple[str, nn.Module]]", model.named_modules())
        for key, value in part.__dict__.items()
        if isinstance(value, (int, float)) and key != "training"
    }


def number_notes(model: nn.Module, earlier: dict[str, float]) -> list[str]:
    """A note on every number that a call has changed."""
    current = numbers_of(model)
    return [
        f"forward of {type(model).__name__} changes the number {name}: it is a constant of every product, as in a call "
        f"that starts from {value}; a buffer would change from call to call"
        for name, value in earlier.items()
        if current.get(name, value) != value
    ]


@contextmanager
def stateless(model: nn.Module) -> Generator[None]:
    """Let a module's parts have copies of their buffers and tensors inside this block, so that no call changes them."""
    copies: dict[int, torch.Tensor] = {}

    def copied(value: object) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return copies.setdefault(id(value), value.clone())

    with restored(model):
        for part in model.modules():
            for name, buffer in part._buffers.items():
                part._buffers[name] = copied(buffer)
            for name, value in part.__dict__.items():
                part.__dict__[name] = copied(value)
        yield


def state_notes(nodes: Iterable[fx.Node]) -> list[str]:
    """A note on every weight and buffer that a call changes."""
    return [
        f"forward changes {name} ({source_of(node) or module_of(node)[1]}): a program has no state, so each call of it "
        "starts from the value that was compiled; the trainable module goes on from call to call"
        for name, node in written_weights(nodes).items()
    ]
