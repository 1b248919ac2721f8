"""Where the tokens of a sequence are: the axis of every value that is computed from the token ids.

A graph that keeps the tokens apart outside attention can be run on the new tokens alone, with the keys and values of the
past: see `adaptc.rewriter.cache`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy  # pyright: ignore[reportMissingTypeStubs]
import torch
from torch import fx

from adaptc.ir.nodes import size_expression


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


class MixesTokensError(Exception):
    """An operation lets tokens meet outside attention, or might; `str` says how."""


@dataclass(frozen=True)
class TokenMap:
    """The axes of all values that are computed from the token ids.

    Attributes:
        axes: node -> axes. A node that is missing is not computed from the ids.
        mixing: (node, how it mixes tokens), for nodes where tokens meet outside attention. What is computed from one is not
            followed further.
    """

    axes: Mapping[fx.Node, Axes]
    mixing: Sequence[tuple[fx.Node, str]]


def shape_of(node: fx.Node) -> list[Any]:
    """The sizes of a value, as formulas in the sizes of the inputs."""
    return [size_expression(size) for size in value_of(node).shape]


def value_of(node: fx.Node) -> torch.Tensor:
    """The recorded value of a node; the first of several."""
    value: Any = node.meta["val"]
    while isinstance(value, (list, tuple)):
        value = next(item for item in value if item is not None)  # pyright: ignore[reportUnknownVariableType]
    return value  # pyright: ignore[reportUnknownVariableType]


def holds_tensor(node: fx.Node) -> bool:
    """Whether a node gives a tensor, or several."""
    value: Any = node.meta.get("val")
    return any(isinstance(item, torch.Tensor) for item in _flat(value))


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for item in value:  # pyright: ignore[reportUnknownVariableType]
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
    slower, entries = sympy.prod(source[: axis.axis]) * axis.before, tokens + axis.front
    for position, size in enumerate(result):
        before = slower / sympy.prod(result[:position])
        after = size / (before * entries)
        if _counts(before) and _counts(after):
            return replace(axis, axis=position, before=before, after=after)
    raise MixesTokensError("its view cuts through the tokens")


def _counts(number: Any) -> bool:
    """Whether a formula is a number of things: a product of whole numbers and sizes."""
    return sympy.denom(sympy.cancel(number)) == 1
