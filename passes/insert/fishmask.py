"""FishMask: training of the entries with the largest Fisher information."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from adaptc.methods.method import method
from adaptc.methods.sparse import Chosen

if TYPE_CHECKING:
    from torch import Tensor

Ratio = Annotated[float, Field(gt=0, le=1, description="share of all entries that is trained")]


@method("fishmask")
@dataclass(frozen=True)
class Fishmask(Chosen):
    """W' = W + D        D sparse: the k entries of all weights with the largest Fisher information

    Sung et al. 2021, section 3: k is `keep_ratio` of the entries that the target names. They are chosen once, from the
    spec's `calibration`, by the empirical Fisher information: the mean over examples of the squared gradient of the
    loss (equation 6).
    """

    keep_ratio: Ratio = 0.005

    small = {"keep_ratio": 0.3}

    @property
    def ratio(self) -> float:
        """`keep_ratio`."""
        return self.keep_ratio

    def weight(self, W: Tensor, *, delta: Tensor, at: Tensor) -> Tensor:
        """W + D, of W's own shape."""
        return W.flatten().scatter_add(0, at, delta).view(W.shape)
