"""DoRA: weight-decomposed low-rank adaptation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from adaptc.methods.low_rank import LowRank, LowRankFormat
from adaptc.methods.method import method
from adaptc.methods.param import Param
from adaptc.methods.peft_format import PeftFormat

if TYPE_CHECKING:
    from torch import Tensor

    from adaptc.methods.site import WeightSite


@method("dora")
@dataclass(frozen=True)
class Dora(LowRank):
    """W' = m V / ‖V‖,  V = W + (alpha / r) B A        m (out,)   A (r, in)   B (out, r)

    Liu et al. 2024, equation 5; ‖V‖ is the norm of each row and a constant in the backward pass (section 4.3).
    m starts as ‖W‖, so that W' = W; a row of zeros stays one. Dropout goes in front of B A only; PEFT drops the base
    term's input too.
    """

    peft: ClassVar[PeftFormat[Any] | None] = LowRankFormat.of("LORA", use_dora=True, adaptc_nested=False)

    def params(self, site: WeightSite) -> dict[str, Param]:
        """A (r, in) Kaiming-uniform, B (out, r) zero, m (out,) the norms of W's rows."""
        shape, flat = (site.out_features,), None
        if site.kind == "conv" and self.in_peft(site):
            shape, flat = (1, site.out_features, *(1,) * (len(site.shape) - 2)), lambda m: m.flatten()
        return {
            **self.factors(site),
            "m": Param(shape, lambda W, _: W.norm(dim=1), "lora_magnitude_vector", flat),
        }

    def weight(self, W: Tensor, *, A: Tensor, B: Tensor, m: Tensor) -> Tensor:
        """m V / ‖V‖, of shape (out, in)."""
        V = W + self.scale * (B @ A)
        norm = V.detach().norm(dim=1)
        return (m / norm.masked_fill(norm == 0, 1.0)).unsqueeze(1) * V
