"""Choices between near equals, such as a router's among experts.

Rounding may turn them, and another expert computes something else altogether. So a side that is held against another
makes the other's choices, where they are as good as its own to within the tolerance; elsewhere it makes its own, and
the difference shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

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
"""Operations that give values of their operand and where these stood -> which argument says along which dimension,
and what it is by default."""


def makes_choice(node: fx.Node) -> bool:
    """Whether it chooses for the model; what an adapter chooses by itself, both sides of a proof need not have."""
    return node.target in DIMENSION and node.meta.get(ADAPTATION) is None


@dataclass
class TieBreaks:
    """The choices of one run, in order.

    Attributes:
        others: what the other side chose.
        near: how far apart values may be, over the largest value, to be as good as one another.
        made: where the chosen values stood.
        flipped: how many would have been made otherwise.
    """

    others: Sequence[torch.Tensor] = ()
    near: float = 0.0
    made: list[torch.Tensor] = field(default_factory=list)
    flipped: int = 0

    def make(self, node: fx.Node, operand: torch.Tensor, chosen: Any) -> Any:
        """What an operation chose from its operand, `(values, indices)`, or what the other side did there."""
        if len(self.made) < len(self.others):
            theirs = self.others[len(self.made)]
            values = _taken(node, operand, theirs)
            if _near(values, chosen[0], self.near, operand):
                self.flipped += int((theirs != chosen[1]).sum())
                chosen = values, theirs
        self.made.append(chosen[1])
        return chosen


def _near(values: torch.Tensor, own: torch.Tensor, near: float, operand: torch.Tensor) -> bool:
    """Whether values are as good as one's own: equal, or no further apart than that; what is masked is not near."""
    values, own, operand = values.double(), own.double(), operand.double()
    largest = operand[torch.isfinite(operand)].abs()
    allowed = near * float(largest.max()) if largest.numel() else 0.0
    return bool(((values == own) | ((values - own).abs() <= allowed)).all())


def _taken(node: fx.Node, operand: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The values of the operand that stand at these indices."""
    place, default = DIMENSION[node.target]  # type: ignore[index]
    dim: Any = node.args[place] if len(node.args) > place else node.kwargs.get("dim", default)
    if indices.dim() == operand.dim():
        return operand.gather(dim, indices)
    return operand.gather(dim, indices.unsqueeze(dim)).squeeze(dim)
