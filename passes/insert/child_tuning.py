"""Child-tuning: training of a part of the network at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from adaptc.methods.method import method
from adaptc.methods.param import Param
from adaptc.methods.sparse import Chosen
from adaptc.methods.training_rule import TrainingRule

if TYPE_CHECKING:
    from torch import Tensor

    from adaptc.methods.site import WeightSite

Variant = Annotated[
    Literal["F", "D"],
    Field(description="F: task-free, another part each step; D: task-driven, chosen once by data"),
]
Share = Annotated[float, Field(gt=0, le=1, description="share of the entries that is trained (at a time)")]


@method("child-tuning")
@dataclass(frozen=True)
class ChildTuning(Chosen):
    """W' = W + D        D of W's own shape (F), or the sparse k entries with the largest Fisher information (D)

    Xu et al. 2021, section 3. Task-free (F), `adaptc.TrainingStep` multiplies each step's gradient by a random mask,
    1 with probability `reserve_p`, and divides it by `reserve_p` (algorithm 1). Task-driven (D), the k entries are
    chosen once, by the empirical Fisher information from the spec's `calibration` (equation 4). D starts at zero.
    """

    variant: Variant = "F"
    reserve_p: Share = 0.3

    small = {"variant": "D"}

    @property
    def ratio(self) -> float:
        """`reserve_p`."""
        return self.reserve_p

    @property
    def calibrated(self) -> bool:
        """Only the task-driven variant is chosen by data."""
        return self.variant == "D"

    def params(self, site: WeightSite) -> dict[str, Param]:
        """The delta: whole, or its chosen entries and their indices."""
        if self.variant == "D":
            return super().params(site)
        return {"delta": Param(site.shape, "zeros", f"child_tuning_delta.{site.leaf}")}

    def weight(self, W: Tensor, *, delta: Tensor, at: Tensor | None = None) -> Tensor:
        """W + D, of W's own shape."""
        if at is None:
            return W + delta
        return W.flatten().scatter_add(0, at, delta).view(W.shape)

    def rule(self, sites: Sequence[Mapping[str, Tensor]], steps: int | None) -> TrainingRule | None:
        """A mask on the gradients of each step, in the task-free variant."""
        return _Masks([site["delta"] for site in sites], self.reserve_p) if self.variant == "F" else None


class _Masks(TrainingRule):
    """Multiplies every gradient by a mask that is drawn anew at each step."""

    def __init__(self, deltas: Sequence[Tensor], share: float):
        import torch

        self.deltas, self.share = deltas, share
        # The same on every device of a distributed training.
        self.generator = torch.Generator().manual_seed(0)

    def before(self, number: int) -> None:
        """Draw the mask of this step."""
        for delta in self.deltas:
            if delta.grad is not None:
                mask = delta.grad.new_empty(delta.shape, device="cpu").bernoulli_(
                    self.share, generator=self.generator
                )
                delta.grad.mul_(mask.to(delta.grad.device)).div_(self.share)
