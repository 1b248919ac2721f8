"""What methods share that train few entries of a weight, those with the largest Fisher information."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Self

from pydantic import Field

from adaptc.methods.method import WeightMethod
from adaptc.methods.param import Param

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from adaptc.methods.site import WeightSite

STEPS = 64
"""Bisections of the interval of the threshold: more than the 53 bits of a float64 can resolve."""
Counts = Annotated[
    Mapping[str, int],
    Field(
        description="how many entries of each parameter are trained, by its full name; chosen by `calibration`"
    ),
]


@dataclass(frozen=True)
class Chosen(WeightMethod):
    """A method that trains the entries with the largest Fisher information among all that the target names.

    Before there is data (in a plan), every parameter trains its share. Checkpoints hold a sparse delta (k,) and the
    indices (k,) of its entries.
    """

    counts: Counts = field(default_factory=dict[str, int])

    kinds = frozenset({"parameter"})

    @property
    def ratio(self) -> float:
        """The share of all entries that is trained, in (0, 1]."""
        raise NotImplementedError

    @property
    def calibrated(self) -> bool:
        """True: data choose the entries."""
        return True

    def takes(self, site: WeightSite) -> bool:
        """Whether any entry of a parameter is trained."""
        return not self.counts or self.counts.get(site.name, 0) > 0

    def params(self, site: WeightSite) -> dict[str, Param]:
        """The delta (k,) zero, and the indices (k,) of its entries in the flat weight, in ascending order."""
        size = 1
        for side in site.shape:
            size *= side
        count = self.counts.get(site.name, max(1, round(self.ratio * size)))
        kind = self.name.replace("-", "_")

        def indices(information: Tensor, _: Generator) -> Tensor:
            return information.flatten().topk(count).indices.sort()[0]

        return {
            "delta": Param((count,), "zeros", f"{kind}_delta.{site.leaf}"),
            "at": Param((count,), indices, f"{kind}_places.{site.leaf}", trained=False, below=size),
        }

    def calibrate(self, information: Mapping[str, Tensor]) -> Self:
        """The method with `counts`: how many of the largest entries of all lie in each parameter."""
        wanted = max(1, round(self.ratio * sum(values.numel() for values in information.values())))
        low, high = 0.0, max(float(values.max()) for values in information.values())
        for _ in range(STEPS):
            middle = (low + high) / 2
            above = sum(int((values > middle).sum()) for values in information.values())
            low, high = (middle, high) if above > wanted else (low, middle)
        counts = {name: int((values > high).sum()) for name, values in information.items()}
        return replace(self, counts={name: count for name, count in counts.items() if count})
