"""BitFit: training of the biases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from adaptc.methods.method import WeightMethod, method
from adaptc.methods.param import Param

if TYPE_CHECKING:
    from torch import Tensor

    from adaptc.methods.site import WeightSite


@method("bitfit")
@dataclass(frozen=True)
class Bitfit(WeightMethod):
    """b' = b + d        d of b's own shape, for every bias that the target names

    Ben Zaken et al. 2022, section 3. d starts at zero.
    """

    kinds = frozenset({"parameter"})

    def takes(self, site: WeightSite) -> bool:
        """Whether a parameter is a bias, by its name."""
        return site.leaf == "bias" or site.leaf.endswith("_bias")

    def params(self, site: WeightSite) -> dict[str, Param]:
        """d, zero."""
        return {"d": Param(site.shape, "zeros", f"bitfit_delta.{site.leaf}")}

    def weight(self, W: Tensor, *, d: Tensor) -> Tensor:
        """b + d."""
        return W + d
