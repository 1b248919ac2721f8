"""DyLoRA: low-rank adaptation at any rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from adaptc.methods.low_rank import LowRank, LowRankFormat
from adaptc.methods.method import method
from adaptc.methods.param import Param
from adaptc.methods.training_rule import TrainingRule

if TYPE_CHECKING:
    from torch import Tensor

    from adaptc.methods.site import WeightSite


@method("dylora")
@dataclass(frozen=True)
class Dylora(LowRank):
    """W' = W + (alpha / b) B[:, :b] A[:b],  b ≤ r drawn at each step of training, r else        A (r, in)   B (out, r)

    Valipour et al. 2023, section 4: ranks are nested, so that one training gives an adapter of every rank up to r. Set
    the rank when a checkpoint is compiled (`--set adapt.0.r=4`). `adaptc.TrainingStep` draws b. A starts
    Kaiming-uniform, B at zero. A checkpoint is that of LoRA of rank r.
    """

    peft = LowRankFormat.of("LORA", use_dora=False, adaptc_nested=True)

    def params(self, site: WeightSite) -> dict[str, Param]:
        """A (r, in), B (out, r), and m (r, 1): 1 / b for the ranks in force, zero for the others."""
        mask = Param(
            (self.r, 1), lambda W, _: self.mask(W, self.r), "dylora_mask", trained=False, stored=False
        )
        return {**self.factors(site), "m": mask}

    def weight(self, W: Tensor, *, A: Tensor, B: Tensor, m: Tensor) -> Tensor:
        """W + alpha B diag(m) A, of shape (out, in)."""
        return W + self.alpha * (B @ (m * A))

    def cut(self, r: int) -> Self:
        """The method with the first r ranks alone."""
        return replace(self, r=r, rank_pattern={})

    def cut_tensors(self, theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The first r rows of A and columns of B."""
        return {**theta, "A": theta["A"][: self.r], "B": theta["B"][:, : self.r]}

    def rule(self, sites: Sequence[Mapping[str, Tensor]], steps: int | None) -> TrainingRule | None:
        """Draws another rank for each step."""
        return _Ranks(self, [site["m"] for site in sites])

    def mask(self, like: Tensor, b: int) -> Tensor:
        """m (r, 1) for the first b ranks, in the dtype of a tensor: 1 / b, or 1 / sqrt(b) with `rslora`; then zero."""
        mask = like.new_zeros(self.r, 1)
        mask[:b] = 1 / (b**0.5 if self.rslora else b)
        return mask


class _Ranks(TrainingRule):
    """Writes the rank of a step into every mask: a random one in training, all ranks otherwise."""

    def __init__(self, method: Dylora, masks: Sequence[Tensor]):
        import torch

        self.method, self.masks = method, masks
        # The same on every device of a distributed training.
        self.generator = torch.Generator().manual_seed(0)
        self.drawn, self.shown = 0, False
        self.after(0)

    def forward(self, training: bool) -> None:
        """The rank drawn for this step, or all of them."""
        if training != self.shown:
            self._show(training)

    def after(self, number: int) -> None:
        """Draw the rank of the next step."""
        import torch

        self.drawn = int(torch.randint(2**31, (1,), generator=self.generator))
        if self.shown:
            self._show(True)

    def _show(self, training: bool) -> None:
        self.shown = training
        for mask in self.masks:
            r = mask.shape[-2]
            method = replace(self.method, r=r)
            mask.copy_(method.mask(mask, 1 + self.drawn % r if training else r))
