"""What a method does while it is trained; called by `adaptc.TrainingStep`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class Rule:
    """What a method does while it is trained, besides its gradient. Every hook does nothing unless overridden."""

    def forward(self, training: bool) -> None:
        """Before the model runs."""

    def penalty(self) -> Tensor | None:
        """What is added to the loss."""
        return None

    def before(self, number: int) -> None:
        """Before the optimizer's step, counted from 1; gradients are there."""

    def after(self, number: int) -> None:
        """After it."""
