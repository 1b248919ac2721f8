"""Where the tokens of a sequence are: the axis of every value that is computed from the token ids.

A graph that keeps the tokens apart outside attention can be run on the new tokens alone, with the keys and values of
the past: see `adaptc.rewriter.cache`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import sympy  # pyright: ignore[reportMissingTypeStubs]
import torch
from torch import fx

from adaptc.ir.nodes import is_operator, node_arg, size_expression

algebra: Any = sympy  # it has no types


@dataclass(frozen=True)
class TokenAxis:
    """One axis of a value along which the tokens lie: `before * tokens * after` entries, `before` the slowest.

    Attributes:
        axis: its position, from the front.
        before: how many sequences are in it, as the rows of `(batch * tokens, features)`; 1 if it holds tokens alone.
        after: how many entries each token has in it.
        past: whether the tokens of the past are in it too, as in the keys and values of an attention.
        front: how many other entries stand in front of the tokens, such as a prefix.
    """

    axis: int
    before: Any = sympy.S.One
    after: Any = sympy.S.One
    past: bool = False
    front: Any = sympy.S.Zero

    @property
    def alone(self) -> bool:
        """Whether the axis holds tokens and nothing else."""
        return self.before == 1 and self.after == 1

    def at(self, axis: int) -> TokenAxis:
        """The same tokens along another axis."""
        return replace(self, axis=axis)


Axes = tuple[TokenAxis, ...]
"""The axes of one value: one; two of scores (tokens that ask, tokens that are seen); none if only the last tokens are
left in it."""

Operands = Mapping[fx.Node, Axes]
"""The axes of the operands of a node that are computed from the ids."""
Rule = Callable[[fx.Node, Operands, Any], Axes]
"""Called with a node, the axes of its operands and the number of tokens: gives the axes of its result."""


class MixesTokensError(Exception):
    """An operation lets tokens meet outside attention, or might; `str` says how."""


@dataclass(frozen=True)
class TokenMap:
    """The axes of all values that are computed from the token ids.

    Attributes:
        axes: node -> axes. A node that is missing is not computed from the ids.
        mixing: (node, how it mixes tokens), for nodes where tokens meet outside attention. What is computed from one is
            not followed further.
    """

    axes: Mapping[fx.Node, Axes]
    mixing: Sequence[tuple[fx.Node, str]]


def shape_of(node: fx.Node) -> list[Any]:
    """The sizes of a value, as formulas in the sizes of the inputs."""
    return [size_expression(size) for size in value_of(node).shape]


def value_of(node: fx.Node) -> torch.Tensor:
    """The recorded value of a node; the first of several."""
    return next(item for item in _flat(node.meta["val"]) if item is not None)


def holds_tensor(node: fx.Node) -> bool:
    """Whether a node gives a tensor, or several."""
    value: Any = node.meta.get("val")
    return any(isinstance(item, torch.Tensor) for item in _flat(value))


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for item in cast(Sequence[Any], value):
            yield from _flat(item)
    else:
        yield value


def viewed(axes: Axes, source: Sequence[Any], result: Sequence[Any], tokens: Any) -> Axes:
    """The axes after a view that keeps the entries in their order.

    Args:
        axes: of the operand.
        source: the sizes of the operand.
        result: the sizes of the result.
        tokens: the number of tokens.

    Raises:
        MixesTokensError: an axis of the result holds a part of the tokens.
    """
    return tuple(_viewed(axis, source, result, tokens) for axis in axes)


def _viewed(axis: TokenAxis, source: Sequence[Any], result: Sequence[Any], tokens: Any) -> TokenAxis:
    slower, entries = algebra.prod(source[: axis.axis]) * axis.before, tokens + axis.front
    for position, size in enumerate(result):
        before = slower / algebra.prod(result[:position])
        after = size / (before * entries)
        if _counts(before) and _counts(after):
            return replace(axis, axis=position, before=before, after=after)
    raise MixesTokensError("its view cuts through the tokens")


def _counts(number: Any) -> bool:
    """Whether a formula is a number of things: a product of whole numbers and sizes."""
    return bool(algebra.denom(algebra.cancel(number)) == 1)


def same_axes(several: Any) -> Axes:
    """The axes that several values share.

    Raises:
        MixesTokensError: they differ.
    """
    first, *others = several
    if any(set(first) != set(other) for other in others):
        raise MixesTokensError("each token meets other tokens in it")
    return first


def sole(operands: Operands, node: fx.Node) -> tuple[fx.Node, Axes]:
    """The first operand, and its axes; it must be the only one with tokens."""
    first = node_arg(node, 0)
    if list(operands) != [first]:
        raise MixesTokensError("it is not known to keep tokens apart")
    return first, operands[first]


def dims_of(node: fx.Node) -> list[int] | None:
    """The axes that an operation names by its argument `dim`; None if it names none, and works on all."""
    named = argument(node, "dim")
    if named is None or named == []:
        return None
    rank = value_of(node_arg(node, 0)).dim()
    listed = cast(list[int], named if isinstance(named, (list, tuple)) else [named])
    return [int(axis) % rank for axis in listed]


def argument(node: fx.Node, *names: str) -> Any:
    """An argument of a node by its name in torch's schema, or its default."""
    schema: Any = node.target._schema if is_operator(node.target) else None  # pyright: ignore[reportPrivateUsage]
    for position, argument in enumerate(schema.arguments if schema is not None else ()):
        if argument.name in names:
            if position < len(node.args):
                return node.args[position]
            return node.kwargs.get(argument.name, argument.default_value)
    return None


def with_past(axes: Axes) -> Axes:
    """The same tokens with those of the past in front."""
    return tuple(replace(axis, past=True) for axis in axes)
