"""Layouts: how a stored weight of any shape, seen through any views, reads as matrices `(out, in)`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from adaptc.ir.analysis.matrix_products import matrix_axes
from adaptc.ir.nodes import list_arg, operation
from adaptc.methods.site import Layout

KEEPING_AXES = frozenset(
    {"to", "_to_copy", "contiguous", "clone", "slice", "split", "split_with_sizes", "chunk", "getitem"}
)
"""Operations whose result has the axes of their operand, in the same order."""
Axes = tuple[int | None, ...]
"""For each axis of a value, which axis of the stored weight it is; None for one that a view added."""


def through(node: fx.Node, axes: Axes) -> Axes | None:
    """The axes of a view of a weight.

    Args:
        node: the operation.
        axes: of its operand.

    Returns:
        the axes of its result; None if it is no view, or mixes axes.
    """
    args: Any = node.args
    match operation(node):
        case "t" | "numpy_T":
            return axes[::-1]
        case "mT":
            return (*axes[:-2], axes[-1], axes[-2])
        case "transpose":
            order = list(axes)
            order[args[1]], order[args[2]] = order[args[2]], order[args[1]]
            return tuple(order)
        case "permute":
            return tuple([axes[int(i)] for i in list_arg(node, 1)])
        case "unsqueeze":
            at = args[1] % (len(axes) + 1)
            return (*axes[:at], None, *axes[at:])
        case "expand":
            return (*([None] * (len(args[1]) - len(axes))), *axes)
        case "select":
            at = args[1] % len(axes)
            return (*axes[:at], *axes[at + 1 :])
        case "index" if len(args[1]) == 1 and args[1][0].meta["val"].dim() == 1:
            return axes  # a matrix gathered for each token
        case name if name in KEEPING_AXES:
            return axes
        case _:
            return None


def consumers(weight: fx.Node, users: Sequence[fx.Node]) -> list[tuple[fx.Node, Layout | None]]:
    """The operations that read a weight, through views or directly.

    Args:
        weight: the weight.
        users: those of its users to start from.

    Returns:
        (operation, how it reads the weight; None if it is no matrix product with it) for each.
    """
    readers: list[tuple[fx.Node, Layout | None]] = []
    axes: Axes = tuple(range(weight.meta["val"].dim()))
    queue = [(weight, user, axes) for user in users]
    while queue:
        value, user, axes = queue.pop(0)
        viewed = through(user, axes) if user.args and user.args[0] is value else None
        if viewed is not None:
            queue += [(user, reader, viewed) for reader in user.users]
        else:
            readers.append((user, _layout_at(user, value, axes, weight.meta["val"].dim())))
    return readers


def _layout_at(user: fx.Node, value: fx.Node, axes: Axes, rank: int) -> Layout | None:
    """How an operation reads a weight of this rank through a view whose axes are these."""
    viewed = matrix_axes(user, value, len(axes))
    if viewed is None:
        return None
    out, inner = ([axes[i] for i in positions] for positions in viewed)
    sides = [axis for axis in (*out, *inner) if axis is not None]
    if len(set(sides)) < len(out) + len(inner):  # a view added one of them, or repeats it
        return None
    rest = tuple(axis for axis in range(rank) if axis not in sides)
    return Layout(tuple(sides[: len(out)]), tuple(sides[len(out) :]), rest)
