"""Choices between near equals, such as a router's among experts.

Rounding can flip a choice, and then another expert computes something else altogether. So a run that is compared with
another one takes that run's choices wherever they are as good as its own to within the tolerance. Elsewhere it makes
its own, and the difference shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import fx

from adaptc.ir.nodes import ADAPTATION

aten = torch.ops.aten
PAIRS: dict[Any, tuple[int, int | None]] = {
    aten.topk.default: (2, -1),
    aten.sort.default: (1, -1),
    aten.sort.stable: (1, -1),
    aten.max.dim: (1, None),
    aten.min.dim: (1, None),
    aten.median.dim: (1, None),
    aten.kthvalue.default: (2, -1),
}
"""Operations that give values of their operand and the indices of these -> (the position of the argument that is the
dimension, its default)."""
INDICES: dict[Any, tuple[int, int | None]] = {
    aten.argmax.default: (1, None),
    aten.argmin.default: (1, None),
    aten.argsort.default: (1, -1),
    aten.argsort.stable: (2, -1),
}
"""The same for operations that give indices alone; where the dimension is None, those of the flattened operand."""


def makes_choice(node: fx.Node) -> bool:
    """Whether a node chooses, and is part of the base: only choices of the base are in both runs of a proof."""
    return node.target in PAIRS | INDICES and node.meta.get(ADAPTATION) is None


@dataclass
class TieBreaks:
    """The choices of one run on one batch, in the order of execution.

    Attributes:
        others: the indices that the other run chose, one tensor for each choice.
        near: how far apart two values may be to be equally good, as a share of the largest value of the operand.
        indices: the indices that this run chose.
        flipped: how many of them this run would have chosen otherwise by itself.
    """

    others: Sequence[torch.Tensor] = ()
    near: float = 0.0
    indices: list[torch.Tensor] = field(default_factory=list[torch.Tensor])
    flipped: int = 0

    def make(self, node: fx.Node, operand: torch.Tensor, chosen: Any) -> Any:
        """Keep an operation's choice, or replace it by the other run's where that is as good.

        Args:
            node: the operation.
            operand: what it chose from.
            chosen: `(values, indices)`, its result, or the indices alone.

        Returns:
            The same of the choice that holds.
        """
        pair = node.target in PAIRS
        indices: torch.Tensor = chosen[1] if pair else chosen
        if len(self.indices) < len(self.others):
            theirs = self.others[len(self.indices)]
            if bool(as_good(node, operand, indices, theirs, self.near).all()):
                self.flipped += int((theirs != indices).sum())
                indices = theirs
                chosen = (_values_at(operand, _dimension(node, operand), theirs), theirs) if pair else theirs
        self.indices.append(indices)
        return chosen


def as_good(
    node: fx.Node, operand: torch.Tensor, indices: torch.Tensor, others: torch.Tensor, near: float
) -> torch.Tensor:
    """Where the values at other indices are as good as those at a node's own.

    That is where they are equal, or within `near` of the operand's largest finite value. No index outside is.
    """
    dim = _dimension(node, operand)
    size = operand.numel() if dim is None else operand.shape[dim]
    inside = (others >= 0) & (others < size)
    values, theirs = (
        _values_at(operand, dim, at).double() for at in (indices, others.where(inside, indices))
    )
    return inside & ((values == theirs) | ((values - theirs).abs() <= near * largest(operand)))


def largest(values: torch.Tensor) -> float:
    """The largest finite absolute value; 0 if there is none."""
    finite = values[torch.isfinite(values)].double().abs()
    return float(finite.max()) if finite.numel() else 0.0


def _dimension(node: fx.Node, operand: torch.Tensor) -> int | None:
    """The dimension that a node chooses along; None where it takes the flattened operand."""
    if operand.dim() == 0:
        return None
    position, default = (PAIRS | INDICES)[cast(Any, node.target)]
    dim: Any = node.args[position] if len(node.args) > position else node.kwargs.get("dim", default)
    return dim


def _values_at(operand: torch.Tensor, dim: int | None, indices: torch.Tensor) -> torch.Tensor:
    """The values of the operand at these indices."""
    if dim is None:
        return operand.flatten()[indices]
    if indices.dim() == operand.dim():
        return operand.gather(dim, indices)
    return operand.gather(dim, indices.unsqueeze(dim)).squeeze(dim)
