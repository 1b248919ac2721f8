"""Reward head: one number for a text, from its last token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from adaptc.methods.head import HeadMethod, Output, last_token
from adaptc.methods.method import Dropout, method
from adaptc.methods.param import Param

if TYPE_CHECKING:
    from torch import Tensor

    from adaptc.methods.point_sites import HeadSite


@method("reward")
@dataclass(frozen=True)
class Reward(HeadMethod):
    """r = w · h_T        h_T (d,) the last real token   w (d,)        Ouyang et al. 2022, section 3.5

    The reward `(batch,)` takes the place of the words that a decoder predicts, or of a classifier's classes. Padding
    may be on either side. `adaptc.losses.pairwise_ranking_loss` trains it on pairs of texts.
    """

    output: Output = "rewards"
    dropout: Dropout = 0.0

    def params(self, site: HeadSite) -> dict[str, Param]:
        """w `(1, d)`."""
        return {"w": Param((1, site.width), "normal", "reward_head.weight")}

    def pooled(self, h: Tensor, m: Tensor, **theta: Tensor) -> Tensor:
        """h_T `(batch, d)`."""
        return last_token(h, m)

    def scores(self, x: Tensor, *, w: Tensor) -> Tensor:
        """The rewards `(batch,)`."""
        from torch.nn.functional import linear

        return linear(x, w).squeeze(-1)
