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
    """W' = W + (alpha / r) B A,  b' = b + (alpha / r) c  with `lora_bias`     A (r, in)   B (out, r)   c (out,)

    Hu et al. 2021, section 4.1. A starts Kaiming-uniform, B and c at zero, as in PEFT.
    """

    lora_bias: bool = False

    peft: ClassVar[PeftFormat | None] = LowRank.peft_format(
        "LORA", {"lora_bias": "lora_bias"}, by_parameter=True, use_dora=False
    )

    def params(self, site: Site) -> dict[str, Param]:
        """A (r, in) Kaiming-uniform, B (out, r) zero, c (out,) zero."""
        c = {"c": Param((site.out_features,), "zeros", "lora_B.bias")} if self.lora_bias else {}
        return {**self.factors(site), **c}

    def refuses(self, site: Site) -> tuple[tuple[str, ...], str] | None:
        """A trained bias needs one to be added to."""
        if self.lora_bias and (site.bias is None or site.rows_repeat):
            return (
                "lora_bias",
            ), "this layer has no bias, one for each row, that lora_bias could be folded into"
        return None

    def adapts_bias(self) -> bool:
        """Only with `lora_bias`."""
        return self.lora_bias

    def weight(self, W: Tensor, *, A: Tensor, B: Tensor, c: Tensor | None = None) -> Tensor:
        """W + scale B A, of shape (out, in)."""
        return W + self.scale * (B @ A)

    def bias(self, b: Tensor, *, c: Tensor, **_: Tensor) -> Tensor:
        """b + scale c, of shape (out,)."""
        return b + self.scale * c
