"""DoRA: weight-decomposed low-rank adaptation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from adaptc.methods.low_rank import LowRank, LowRankFormat
from adaptc.methods.method import method
from adaptc.methods.param import Param
from adaptc.methods.tensors import norm

if TYPE_CHECKING:
    from torch import Tensor

    from adaptc.methods.site import WeightSite


@method("dora")
@dataclass(frozen=True)
class Dora(LowRank):
    """W' = m V / ‖V‖,  V = W + (alpha / r) B A        m (out,)   A (r, in)   B (out, r)

    Liu et al. 2024, equation 5; ‖V‖ is the norm of each row and a constant in the backward pass (section 4.3).
    m starts as ‖W‖, so that W' = W; a row of zeros stays a row of zeros. Dropout acts on the input of B A only; PEFT
    drops the base term's input too.
    """

    peft = LowRankFormat.of("LORA", use_dora=True, adaptc_nested=False)

    def params(self, site: WeightSite) -> dict[str, Param]:
        """A (r, in) Kaiming-uniform, B (out, r) zero, m (out,) the norms of W's rows."""
        m = Param((site.out_features,), lambda W, _: norm(W, 1), "lora_magnitude_vector")
        if site.kind == "conv" and self.in_peft(site):
            ones = (1,) * (len(site.shape) - 2)
            m = replace(m, shape=(1, site.out_features, *ones), unpack=_flat)
        return {**self.factors(site), "m": m}

    def weight(self, W: Tensor, *, A: Tensor, B: Tensor, m: Tensor) -> Tensor:
        """m V / ‖V‖, of shape (out, in)."""
        V = W + self.scale * (B @ A)
        norms = norm(V.detach(), 1)
        return (m / norms.masked_fill(norms == 0, 1.0)).unsqueeze(1) * V


def _flat(m: Tensor) -> Tensor:
    """The magnitudes (1, out, 1, 1) of a convolution as (out,)."""
    return m.flatten()
