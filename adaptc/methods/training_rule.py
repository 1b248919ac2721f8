"""What a method does before and while it is trained, besides its expression."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

if TYPE_CHECKING:
    from torch import Tensor


class TrainingRule:
    """What a method does at each step of a training, besides its gradient; called by `adaptc.TrainingStep`.

    Every hook does nothing unless overridden.
    """

    def forward(self, training: bool) -> None:
        """Called before the model runs."""

    def penalty(self) -> Tensor | None:
        """A scalar that is added to the loss; None for nothing."""
        return None

    def before(self, number: int) -> None:
        """Called before the optimizer's step, counted from 1, when the gradients are there."""

    def after(self, number: int) -> None:
        """Called after the optimizer's step, counted from 1."""


class TrainingHooks:
    """What a method may say about its training. A method that trains by its gradient alone overrides none of it."""

    while_training: ClassVar[frozenset[str]] = frozenset({"dropout"})
    """Options that do not change what a trained adapter computes."""
    fast: ClassVar[frozenset[str]] = frozenset()
    """The tensors that LoRA+ gives a larger learning rate: the outer factors, which start at zero."""

    def rule(self, sites: Sequence[Mapping[str, Tensor]], steps: int | None) -> TrainingRule | None:
        """What happens at each step of a training of so many steps; `sites` are the tensors of every site.

        Raises:
            ValueError: it needs to know the number of steps.
        """
        return None

    @property
    def calibrated(self) -> bool:
        """Whether functions that initialise get the Fisher information of the weight in its place; see `calibrate`."""
        return False

    def calibrate(self, information: Mapping[str, Tensor]) -> Self:
        """The method with what depends on data resolved, from the Fisher information of every site's weight."""
        return self

    @property
    def compensates(self) -> bool:
        """Whether functions that initialise get what quantization lost of the weight in its place."""
        return False

    @property
    def compensation_rounds(self) -> int:
        """How often a weight is quantized, each time without what is made up for so far."""
        return 1

    def compensation(self, lost: Tensor) -> Tensor:
        """The matrix that a method which `compensates` starts by adding, given what a matrix has lost."""
        raise NotImplementedError

    @classmethod
    def trained_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        """Options of a trained adapter, without what only its start depended on."""
        return options

    def compact(self, sites: Mapping[str, dict[str, Tensor]]) -> tuple[Self, Mapping[str, dict[str, Tensor]]]:
        """The same adapter without what training has pruned: its options, and the tensors of every module."""
        return self, sites

    def cut(self, r: int) -> Self | None:
        """The method at a smaller rank, where ranks are nested; None where they are not."""
        return None

    def cut_tensors(self, theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of a larger rank, cut to this method's."""
        return dict(theta)
