"""P-tuning v2: every layer's own prompt, without a network that makes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adaptc.methods.method import method
from adaptc.methods.param import Param
from adaptc.methods.virtual_tokens import PROMPT_KEY, AttentionFormat, AttentionMethod

if TYPE_CHECKING:
    from torch import Tensor

    from adaptc.methods.point_sites import AttentionSite


@method("p-tuning-v2")
@dataclass(frozen=True)
class PTuningV2(AttentionMethod):
    """K' = [P_k; K]   V' = [P_v; V]   P (n, total)    Liu et al. 2022 (P-Tuning v2), section 3

    total is the sum of heads times (key size + value size) over the attentions; drawn from N(0, 0.02), as in the
    authors' code. To PEFT it is prefix tuning without a projection.
    """

    peft = AttentionFormat.of("PREFIX_TUNING")
    small = {"num_virtual_tokens": 3}

    def shared(self, sites: Sequence[AttentionSite]) -> dict[str, Param]:
        """P (n, total), which all attentions read."""
        size = (self.num_virtual_tokens, self.columns(sites)[-1])
        return {"tokens": Param(size, "normal", PROMPT_KEY)}

    def tokens(self, **theta: Tensor) -> Tensor:
        """P `(n, total)`."""
        return theta["tokens"]
