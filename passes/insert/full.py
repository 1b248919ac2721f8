"""Full fine-tuning of chosen modules, such as a new classifier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

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

    Every parameter of the chosen modules is trained whole (PEFT's `modules_to_save`), or those whose own name
    `parameters` has, such as bias. V starts as W, and W is kept, so that adapters can be swapped.
    """

    parameters: Patterns = ("*",)

    kinds: ClassVar[frozenset[str]] = frozenset({"parameter"})
    peft: ClassVar[PeftFormat[Any] | None] = PeftFormat(None, joins="modules_to_save")

    def takes(self, site: WeightSite) -> bool:
        """Whether a parameter is one of those named."""
        return matches_any(self.parameters, site.leaf)

    def params(self, site: WeightSite) -> dict[str, Param]:
        """V, a copy of the base's parameter."""
        return {"V": Param(site.shape, lambda W, _: W, site.leaf)}

    def weight(self, W: Tensor, *, V: Tensor) -> Tensor:
        """V in place of W."""
        return V
