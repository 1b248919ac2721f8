"""Layouts: how a stored weight, of any shape and behind any views, reads as matrices `(out, in)`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from adaptc.ir.analysis.matmul import matrix_axes
from adaptc.ir.nodes import operation
from adaptc.methods.site import Layout

Axes = tuple[int | None, ...]
"""For each axis of a value, which axis of the stored weight it is; None for one that a view added."""


def through(node: fx.Node, axes: Axes) -> Axes | None:
    """The axes after a view of a weight; None where the node is no view, or mixes axes."""
    args: Any = node.args
    match operation(node):
        case "t" | "numpy_T":
            return axes[::-1]
        case "mT":
            return (*axes[:-2], axes[-1], axes[-2])
        case "transpose":
            moved = list(axes)
            moved[args[1]], moved[args[2]] = moved[args[2]], moved[args[1]]
            return tuple(moved)
        case "permute":
            return tuple(axes[i] for i in args[1])
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
        case (
            "to"
            | "_to_copy"
            | "contiguous"
            | "clone"
            | "slice"
            | "split"
            | "split_with_sizes"
            | "chunk"
            | "getitem"
        ):
            return axes
    return None


def consumers(weight: fx.Node, users: Sequence[fx.Node]) -> list[tuple[fx.Node, Layout | None]]:
    """The operations that these users of a weight lead to behind views, and how each reads the weight."""
    found: list[tuple[fx.Node, Layout | None]] = []
    axes: Axes = tuple(range(weight.meta["val"].dim()))
    queue = [(weight, user, axes) for user in users]
    while queue:
        value, user, axes = queue.pop(0)
        behind = through(user, axes) if user.args and user.args[0] is value else None
        if behind is not None:
            queue += [(user, after, behind) for after in user.users]
        else:
            found.append((user, _layout_at(user, value, axes, weight.meta["val"].dim())))
    return found


def _layout_at(user: fx.Node, value: fx.Node, axes: Axes, rank: int) -> Layout | None:
    read = matrix_axes(user, value, len(axes))
    if read is None:
        return None
    out, inner = ([axes[i] for i in positions] for positions in read)
    sides = [axis for axis in (*out, *inner) if axis is not None]
    if len(set(sides)) < len(out) + len(inner):  # a view added one of them, or repeats it
        return None
    rest = tuple(axis for axis in range(rank) if axis not in sides)
    return Layout(tuple(sides[: len(out)]), tuple(sides[len(out) :]), rest)
