"""Full fine-tuning of chosen modules, such as a new classifier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from adaptc.methods.method import Patterns, WeightMethod, method
from adaptc.methods.param import Param
from adaptc.methods.peft_format import PeftFormat
from adaptc.patterns import matches_any

if TYPE_CHECKING:
    from torch import Tensor

    from adaptc.methods.site import WeightSite


@method("full")
@dataclass(frozen=True)
class Full(WeightMethod):
    """W' = V        V of W's own shape

    Trains every parameter of the chosen modules whole (PEFT's `modules_to_save`), or only those whose name matches
    `parameters`, such as bias. V starts as W. The model keeps W, so that adapters can be swapped.
    """

    parameters: Patterns = ("*",)

    kinds = frozenset({"parameter"})
    replaces = True
    peft = PeftFormat(None, joins="modules_to_save", ties=True)

    def takes(self, site: WeightSite) -> bool:
        """Whether the name of a parameter matches `parameters`."""
        return matches_any(self.parameters, site.leaf)

    def params(self, site: WeightSite) -> dict[str, Param]:
        """V, a copy of the base's parameter."""
        return {"V": Param(site.shape, lambda W, _: W, site.leaf)}

    def weight(self, W: Tensor, *, V: Tensor) -> Tensor:
        """V in place of W."""
        return V
