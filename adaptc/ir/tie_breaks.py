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
DIMENSION = {
    aten.topk.default: (2, -1),
    aten.sort.default: (1, -1),
    aten.sort.stable: (1, -1),
    aten.max.dim: (1, None),
}
"""Operations that give values of their operand and the indices of these -> (the position of the argument that is the
dimension, its default)."""


def makes_choice(node: fx.Node) -> bool:
    """Whether a node chooses, and is part of the base: only choices of the base are in both runs of a proof."""
    return node.target in DIMENSION and node.meta.get(ADAPTATION) is None


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
            chosen: `(values, indices)`, its result.

        Returns:
            `(values, indices)` of the choice that holds.
        """
        if len(self.indices) < len(self.others):
            theirs = self.others[len(self.indices)]
            values = _values_at(node, operand, theirs)
            if _near(values, chosen[0], self.near, operand):
                self.flipped += int((theirs != chosen[1]).sum())
                chosen = values, theirs
        self.indices.append(chosen[1])
        return chosen


def _near(values: torch.Tensor, chosen: torch.Tensor, near: float, operand: torch.Tensor) -> bool:
    """Whether values are as good as the chosen ones: equal, or within `near` of the operand's largest finite value."""
    values, chosen, operand = values.double(), chosen.double(), operand.double()
    finite = operand[torch.isfinite(operand)].abs()
    allowed = near * float(finite.max()) if finite.numel() else 0.0
    return bool(((values == chosen) | ((values - chosen).abs() <= allowed)).all())


def _values_at(node: fx.Node, operand: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The values of the operand at these indices, along the dimension of the operation."""
    position, default = DIMENSION[cast(Any, node.target)]
    dim: Any = node.args[position] if len(node.args) > position else node.kwargs.get("dim", default)
    if indices.dim() == operand.dim():
        return operand.gather(dim, indices)
    return operand.gather(dim, indices.unsqueeze(dim)).squeeze(dim)
