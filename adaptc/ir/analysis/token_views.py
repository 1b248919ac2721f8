"""What views, slices and joins do to the axis of the tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

from torch import fx

from adaptc.ir.analysis.token_axes import (
    Axes,
    MixesTokensError,
    Operands,
    Rule,
    argument,
    same_axes,
    shape_of,
    sole,
    value_of,
    viewed,
)
from adaptc.ir.nodes import RESHAPES, list_arg, operation


def _view(node: fx.Node, operands: Operands, tokens: Any) -> Axes:
    first, axes = sole(operands, node)
    return viewed(axes, shape_of(first), shape_of(node), tokens)


def _renumbered(order: Callable[[fx.Node, int], list[int]]) -> Rule:
    """The rule of a permutation: `order` gives, for each axis of the result, that of the operand."""

    def rule(node: fx.Node, operands: Operands, tokens: Any) -> Axes:
        first, axes = sole(operands, node)
        moved = order(node, value_of(first).dim())
        return tuple(axis.at(moved.index(axis.axis)) for axis in axes)

    return rule


def _transpose(node: fx.Node, rank: int) -> list[int]:
    order = list(range(rank))
    first, second = (cast(int, position) % rank for position in node.args[1:3])
    order[first], order[second] = order[second], order[first]
    return order


def _permute(node: fx.Node, rank: int) -> list[int]:
    return [int(axis) % rank for axis in list_arg(node, 1)]


def _expand(node: fx.Node, operands: Operands, tokens: Any) -> Axes:
    first, axes = sole(operands, node)
    return tuple(axis.at(axis.axis + value_of(node).dim() - value_of(first).dim()) for axis in axes)


def _unsqueeze(node: fx.Node, operands: Operands, tokens: Any) -> Axes:
    _, axes = sole(operands, node)
    at = cast(int, node.args[1]) % value_of(node).dim()
    return tuple(axis.at(axis.axis + (at <= axis.axis)) for axis in axes)


def _slice(node: fx.Node, operands: Operands, tokens: Any) -> Axes:
    """`x[start:end]` along an axis: all of the tokens, or the last ones."""
    first, axes = sole(operands, node)
    along = cast(int, argument(node, "dim")) % value_of(first).dim()
    left = tuple(axis for axis in axes if axis.axis != along)
    if len(left) == len(axes) or shape_of(first) == shape_of(node):
        return axes
    start, end = argument(node, "start"), argument(node, "end")
    if start == -1 and (end is None or (isinstance(end, int) and end > 2**31)) and all(a.alone for a in axes):
        return left
    raise MixesTokensError("it takes some of the tokens, by their place")


def _select(node: fx.Node, operands: Operands, tokens: Any) -> Axes:
    first, axes = sole(operands, node)
    along = cast(int, node.args[1]) % value_of(first).dim()
    left = tuple(axis for axis in axes if axis.axis != along)
    if len(left) < len(axes) and (node.args[2] != -1 or not all(axis.alone for axis in axes)):
        raise MixesTokensError("it takes one of the tokens, by its place")
    return tuple(axis.at(axis.axis - (axis.axis > along)) for axis in left)


def _pieces(node: fx.Node, operands: Operands, tokens: Any) -> Axes:
    """`split` and the like: a list of parts along an axis."""
    first, axes = sole(operands, node)
    along = cast(int, argument(node, "dim")) % value_of(first).dim()
    if any(axis.axis == along for axis in axes):
        raise MixesTokensError("it splits the tokens")
    if operation(node) == "unbind":
        return tuple(axis.at(axis.axis - (axis.axis > along)) for axis in axes)
    return axes


def _item(node: fx.Node, operands: Operands, tokens: Any) -> Axes:
    return sole(operands, node)[1]


def _joined(node: fx.Node, operands: Operands, tokens: Any) -> Axes:
    """`cat` and `stack` along another axis than the tokens; a prefix may stand in front of keys and values."""
    axes = same_axes(operands.values())
    rank = value_of(node).dim()
    along = cast(int, argument(node, "dim")) % rank
    if operation(node) == "stack":
        return tuple(axis.at(axis.axis + (axis.axis >= along)) for axis in axes)
    if any(axis.axis == along and not (axis.past and axis.alone) for axis in axes):
        raise MixesTokensError("it puts other values beside the tokens")
    return tuple(replace(a, front=shape_of(node)[along] - tokens) if a.axis == along else a for a in axes)


def _repeat_interleave(node: fx.Node, operands: Operands, tokens: Any) -> Axes:
    _, axes = sole(operands, node)
    along = argument(node, "dim")
    if along is None or any(axis.axis == along % value_of(node).dim() for axis in axes):
        raise MixesTokensError("it repeats tokens")
    return axes


VIEWS: Mapping[str, Rule] = {
    **dict.fromkeys((*RESHAPES, "flatten", "unflatten", "squeeze"), _view),
    "transpose": _renumbered(_transpose),
    "t": _renumbered(lambda node, rank: list(range(rank))[::-1]),
    "mT": _renumbered(lambda node, rank: [*range(rank - 2), rank - 1, rank - 2]),
    "permute": _renumbered(_permute),
    "unsqueeze": _unsqueeze,
    "expand": _expand,
    "slice": _slice,
    "select": _select,
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "unbind"), _pieces),
    "getitem": _item,
    **dict.fromkeys(("cat", "stack", "concat"), _joined),
    "repeat_interleave": _repeat_interleave,
}
"""Name of an operation -> its rule."""
