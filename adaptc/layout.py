"""Layouts: how a stored weight, of any shape and behind any views, reads as matrices `(out, in)`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from adaptc.site import Layout

aten = torch.ops.aten
Axes = tuple[int | None, ...]
"""For each axis of a value, which axis of the stored weight it is; None for one that a view added."""


def _linear(axes: Axes) -> Layout | None:
    return _read(axes, out=[0], inner=[1]) if len(axes) == 2 else None


def _right(axes: Axes) -> Layout | None:
    """`x @ W`: the last two axes are (in, out), those before are batches."""
    return _read(axes, out=[-1], inner=[-2]) if len(axes) >= 2 else None


def _left(axes: Axes) -> Layout | None:
    """`W @ x`: the last two axes are (out, in)."""
    return _read(axes, out=[-2], inner=[-1]) if len(axes) >= 2 else None


def _convolution(axes: Axes) -> Layout | None:
    return _read(axes, out=[0], inner=range(1, len(axes)))


def _transposed_convolution(axes: Axes) -> Layout | None:
    return _read(axes, out=[1], inner=[0, *range(2, len(axes))])


def _embedding(axes: Axes) -> Layout | None:
    return _read(axes, out=[1], inner=[0])


def _read(axes: Axes, out: Sequence[int], inner: Sequence[int]) -> Layout | None:
    """The layout in axes of the stored weight, from positions in what the product is given."""
    rows, columns = ([axes[i] for i in positions] for positions in (out, inner))
    if any(axis is None for axis in (*rows, *columns)):
        return None
    return Layout(tuple(rows), tuple(columns))  # type: ignore[arg-type]


def _einsum(axes: Axes, node: fx.Node, weight: fx.Node) -> Layout | None:
    """Letters summed over are columns, letters of the weight alone are rows; shared ones that stay are batches."""
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    assert isinstance(operands, (list, tuple))
    left, arrow, result = equation.partition("->")
    terms = left.split(",")
    if not arrow:  # what is left is in the order of the alphabet
        letters = left.replace(",", "")
        result = "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    if len(terms) != 2 or not result or "." in equation or list(operands).count(weight) != 1:
        return None
    own, other = terms[list(operands).index(weight)], terms[1 - list(operands).index(weight)]
    inner = [own.index(c) for c in own if c in other and c not in result]
    out = [own.index(c) for c in own if c not in other and c in result]
    return _read(axes, out, inner) if inner and out else None


PRODUCTS: dict[tuple[str, int], Callable[[Axes], Layout | None]] = {
    ("linear", 1): _linear,
    ("addmm", 2): _right,
    ("mm", 1): _right,
    ("mm", 0): _left,
    ("matmul", 1): _right,
    ("matmul", 0): _left,
    ("bmm", 1): _right,
    ("bmm", 0): _left,
    ("baddbmm", 2): _right,
    ("baddbmm", 1): _left,
    ("_grouped_mm", 1): _right,
    ("grouped_mm_fallback", 1): _right,
    ("embedding", 0): _embedding,
    **{(f"conv{n}d", 1): _convolution for n in (1, 2, 3)},
    **{(f"conv_transpose{n}d", 1): _transposed_convolution for n in (1, 2, 3)},
}
"""(operation, operand) -> how a weight reads there; a new spelling of a product is one row."""


def operation(node: fx.Node) -> str:
    """The name of a node's operation, without namespace and overload: `conv2d`."""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target).split(".")[1]
    return getattr(node.target, "__name__", str(node.target))


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
