"""Layer-norm tuning: training of the normalisations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from adaptc.methods.method import WeightMethod, method
from adaptc.methods.param import Param
from adaptc.methods.peft_format import PeftFormat

if TYPE_CHECKING:
    from torch import Tensor

    from adaptc.methods.site import WeightSite


@method("layernorm")
@dataclass(frozen=True)
class Layernorm(WeightMethod):
    """g' = v        v in place of every gain and bias of the normalisations that the target names

    Zhao et al. 2024, section 3. v starts as g. The model keeps g, so that adapters can be swapped.
    """

    kinds = frozenset({"parameter"})
    replaces = True
    peft = PeftFormat("LN_TUNING", any_module=True)

    def takes(self, site: WeightSite) -> bool:
        """Whether a parameter belongs to a normalisation, by the class of its module or the operation that reads it."""
        return "norm" in site.type.lower() or "norm" in site.op

    def params(self, site: WeightSite) -> dict[str, Param]:
        """v, a copy of the base's parameter."""
        return {"v": Param(site.shape, lambda W, _: W, f"ln_tuning_layers.{site.leaf}")}

    def weight(self, W: Tensor, *, v: Tensor) -> Tensor:
        """v in place of g."""
        return v
