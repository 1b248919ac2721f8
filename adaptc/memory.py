"""Operations that share memory: in-place ones and views, as torch's schemas say."""

from __future__ import annotations

from typing import Any

from torch import fx


def writes(target: Any) -> bool:
    """Whether an operation, such as `mul_`, writes to its first operand."""
    schema = getattr(target, "_schema", None)
    return schema is not None and schema.is_mutable


def base_of(node: fx.Node) -> fx.Node:
    """The node that made the memory of a value: behind views, and operations that gave back what they wrote to."""
    while node.op == "call_function" and _gives_operand(node.target):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _gives_operand(target: Any) -> bool:
    schema = getattr(target, "_schema", None)
    return schema is not None and bool(schema.arguments) and schema.arguments[0].alias_info is not None
