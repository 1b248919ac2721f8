"""HiRA: Hadamard high-rank adaptation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from adaptc.methods.method import Dropout, Rank, method
from adaptc.methods.param import Param
from adaptc.methods.peft_format import STARTS, PeftFormat
from adaptc.methods.rank import Ranked, factors

if TYPE_CHECKING:
    from torch import Tensor

    from adaptc.methods.site import WeightSite


@method("hira")
@dataclass(frozen=True)
class Hira(Ranked):
    """W' = W + W ∘ (B A)        A (r, in)   B (out, r)

    Huang et al. 2025, equation 4: the change has a high rank, since W has one. A starts Kaiming-uniform, B at zero.
    """

    r: Rank = 32
    dropout: Dropout = 0.0

    aliases = {"hira_dropout": "dropout"}
    fast = frozenset({"B"})
    peft = PeftFormat(
        "HIRA",
        options={"r": "r", "dropout": "hira_dropout", "rank_pattern": "rank_pattern"},
        neutral={"init_weights": (*STARTS, "gaussian")},
        layers=frozenset({"Linear", "Conv1D", "Embedding", "Conv1d", "Conv2d", "Conv3d"}),
    )

    def params(self, site: WeightSite) -> dict[str, Param]:
        """A (r, in) Kaiming-uniform, B (out, r) zero."""
        return factors(site, self.r, self.in_peft(site), "hira_{}", "hira_embedding_{}")

    def weight(self, W: Tensor, *, A: Tensor, B: Tensor) -> Tensor:
        """W + W ∘ (B A), of shape (out, in)."""
        return W + W * (B @ A)
