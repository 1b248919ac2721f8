"""A method that adaptc does not have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from adaptc import Param, WeightMethod, method

if TYPE_CHECKING:
    from torch import Tensor

    from adaptc.methods.site import WeightSite


@method("diag-shift")
@dataclass(frozen=True)
class DiagShift(WeightMethod):
    """W' = W + gain r c        r (out, 1), a scale of rows   c (1, in), of columns

    Both start so that W' = W: r at zero, c at one.
    """

    gain: Annotated[float, Field(gt=0, description="a factor on what is added")] = 1.0

    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})

    def params(self, site: WeightSite) -> dict[str, Param]:
        """R (out, 1) zero, c (1, in) one."""
        return {
            "r": Param((site.out_features, 1), "zeros", "diag_r"),
            "c": Param((1, site.in_features), "ones", "diag_c"),
        }

    def weight(self, W: Tensor, *, r: Tensor, c: Tensor) -> Tensor:
        """W + gain r c, of shape (out, in)."""
        return W + self.gain * (r * c)
