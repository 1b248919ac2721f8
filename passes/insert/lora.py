"""LoRA: low-rank adaptation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from adaptc.low_rank import LowRank
from adaptc.method import Param, PeftFormat, method

if TYPE_CHECKING:
    from torch import Tensor

    from adaptc.sites import Site


@method("lora")
@dataclass(frozen=True)
class Lora(LowRank):
    """W' = W + (alpha / r) B A        A (r, in)   B (out, r)

    Hu et al. 2021, section 4.1. A starts Kaiming-uniform and B at zero, as in PEFT.
    """

    peft: ClassVar[PeftFormat | None] = LowRank.peft_format("LORA", use_dora=False)

    def params(self, site: Site) -> dict[str, Param]:
        """A (r, in) Kaiming-uniform, B (out, r) zero."""
        return self.factors(site)

    def weight(self, W: Tensor, *, A: Tensor, B: Tensor) -> Tensor:
        """W + scale B A, of shape (out, in)."""
        return W + self.scale * (B @ A)
