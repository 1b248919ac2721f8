"""The policy that methods share which train a few entries of a weight, chosen by their Fisher information."""

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
"""Halvings of the interval in which the threshold is looked for: as many as a float64 can tell apart."""
Counts = Annotated[
    Mapping[str, int],
    Field(
        description="how many entries of each parameter are trained, by its full name; chosen by `calibration`"
    ),
]


@dataclass(frozen=True)
class Chosen(WeightMethod):
    """Trains the entries with the largest Fisher information among all that the target names.

    Before there is data to choose by, each parameter counts with its share. Trained entries are stored as a sparse
    delta (k,) with their places (k,).
    """

    counts: Counts = field(default_factory=dict[str, int])

    kinds = frozenset({"parameter"})

    @property
    def ratio(self) -> float:
        """The share of entries that is trained."""
        raise NotImplementedError

    @property
    def calibrated(self) -> bool:
        """Always: entries are chosen by data."""
        return True

    def takes(self, site: WeightSite) -> bool:
        """Whether any entry of a parameter is chosen."""
        return not self.counts or self.counts.get(site.name, 0) > 0

    def params(self, site: WeightSite) -> dict[str, Param]:
        """The delta (k,) zero, and the places (k,) of its entries, in ascending order."""
        size = 1
        for side in site.shape:
            size *= side
        count = self.counts.get(site.name, max(1, round(self.ratio * size)))
        kind = self.name.replace("-", "_")

        def places(information: Tensor, _: Generator) -> Tensor:
            return information.flatten().topk(count).indices.sort()[0]

        return {
            "delta": Param((count,), "zeros", f"{kind}_delta.{site.leaf}"),
            "at": Param((count,), places, f"{kind}_places.{site.leaf}", trained=False, below=size),
        }

    def calibrate(self, information: Mapping[str, Tensor]) -> Self:
        """How many entries of each parameter are among the largest of all."""
        wanted = max(1, round(self.ratio * sum(values.numel() for values in information.values())))
        low, high = 0.0, max(float(values.max()) for values in information.values())
        for _ in range(STEPS):
            middle = (low + high) / 2
            above = sum(int((values > middle).sum()) for values in information.values())
            low, high = (middle, high) if above > wanted else (low, middle)
        counts = {name: int((values > high).sum()) for name, values in information.items()}
        return replace(self, counts={name: count for name, count in counts.items() if count})
