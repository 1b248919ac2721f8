"""What a method does before and while it is trained, besides its expression."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

if TYPE_CHECKING:
    from torch import Tensor


class TrainingRule:
    """What a method does at each step of a training, besides its gradient. `adaptc.TrainingStep` calls it.

    Every hook does nothing unless overridden. Steps are counted from 1.
    """

    def forward(self, training: bool) -> None:
        """Called before the model runs."""

    def penalty(self) -> Tensor | None:
        """A scalar tensor that is added to the loss; None for nothing."""
        return None

    def before(self, number: int) -> None:
        """Called after the backward pass and before the optimizer's step."""

    def after(self, number: int) -> None:
        """Called after the optimizer's step."""


class TrainingHooks:
    """What a method may say about its training. A method that trains by its gradient alone overrides nothing here.

    In order of time: `calibrated`, `calibrate` choose by data; `compensates`, `compensation_rounds`, `compensation`
    start against the loss of quantization; `rule`, `fast` act on training; `trained_options`, `compact`, `cut`,
    `cut_tensors` and `while_training` are about a trained adapter.
    """

    while_training: ClassVar[frozenset[str]] = frozenset({"dropout"})
    """Options that do not change what a trained adapter computes."""
    fast: ClassVar[frozenset[str]] = frozenset()
    """The tensors that LoRA+ gives a larger learning rate: the outer factors, which start at zero."""

    def rule(self, sites: Sequence[Mapping[str, Tensor]], steps: int | None) -> TrainingRule | None:
        """What happens at each step of a training; None for nothing.

        Args:
            sites: the tensors of every site, by the names of `params` and `shared`.
            steps: how many steps the training has; None where nobody said.

        Raises:
            ValueError: the method needs another number of steps, or any number at all.
        """
        return None

    @property
    def calibrated(self) -> bool:
        """Whether the `init` functions of Params get the Fisher information of the weight in place of the weight."""
        return False

    def calibrate(self, information: Mapping[str, Tensor]) -> Self:
        """The method with options that depend on data.

        Args:
            information: a site's name -> the Fisher information of its weight, of the weight's shape.
        """
        return self

    @property
    def compensates(self) -> bool:
        """Whether the `init` functions of Params get what quantization lost of the weight in place of the weight."""
        return False

    @property
    def compensation_rounds(self) -> int:
        """How often a weight is quantized, each time minus the compensation of the round before."""
        return 1

    def compensation(self, lost: Tensor) -> Tensor:
        """The matrix `(out, in)` that the method adds at its start, from what quantization lost of a matrix."""
        raise NotImplementedError

    @classmethod
    def trained_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        """The options of a trained adapter, without those that only its start depended on."""
        return options

    def compact(self, sites: Mapping[str, dict[str, Tensor]]) -> tuple[Self, Mapping[str, dict[str, Tensor]]]:
        """The adapter without what training has pruned.

        Args:
            sites: a module's name -> the tensors of the adapter there, by the names of `params`.

        Returns:
            the method with the options of the smaller adapter; the module's name -> its remaining tensors.
        """
        return self, sites

    def cut(self, r: int) -> Self | None:
        """The method at a smaller rank, where ranks are nested; None where they are not."""
        return None

    def cut_tensors(self, theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of an adapter of larger rank, cut to this method's rank; by the names of `params`."""
        return dict(theta)
