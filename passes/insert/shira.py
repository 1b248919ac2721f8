"""SHiRA: sparse high-rank adaptation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from adaptc.errors import Fault
from adaptc.methods.method import Rank, WeightMethod, method
from adaptc.methods.param import Param
from adaptc.methods.peft_format import PeftFormat
from adaptc.methods.site import MATRIX_KINDS

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from adaptc.methods.site import WeightSite

Seed = Annotated[int | None, Field(description="of the entries that are chosen; null: the spec's seed")]


@method("shira")
@dataclass(frozen=True)
class Shira(WeightMethod):
    """W' = W + S        S (out, in) sparse: r (in + out) entries s, at random positions

    Bhardwaj et al. 2024, section 3.1, with the random mask: as many entries as LoRA of rank r has. s starts at zero.
    """

    r: Rank = 32
    random_seed: Seed = None

    kinds = MATRIX_KINDS
    small = {"r": 1}
    peft = PeftFormat(
        "SHIRA",
        options={"r": "r", "random_seed": "random_seed"},
        ignored=frozenset({"mask_type"}),
        layers=frozenset({"Linear"}),
    )

    def refuses(self, site: WeightSite) -> Fault | None:
        """No more entries than the weight has."""
        count, most = self._count(site), site.out_features * site.in_features
        return None if count <= most else Fault(("r",), f"r makes {count} entries, and there are {most} here")

    def params(self, site: WeightSite) -> dict[str, Param]:
        """s (k,) zero, and the rows and columns (2, k) of its entries."""
        count, (out, inner) = self._count(site), (site.out_features, site.in_features)

        def positions(_: Tensor, generator: Generator) -> Tensor:
            import torch

            if self.random_seed is not None:
                generator = torch.Generator().manual_seed(self.random_seed)
            flat = torch.randperm(out * inner, generator=generator)[:count].sort()[0]
            return torch.stack([flat // inner, flat % inner])

        return {
            "s": Param((count,), "zeros", "shira_weight"),
            "at": Param((2, count), positions, "shira_indices", trained=False, below=max(out, inner)),
        }

    def weight(self, W: Tensor, *, s: Tensor, at: Tensor) -> Tensor:
        """W + S, of shape (out, in)."""
        return W.flatten().scatter_add(0, at[0] * W.shape[1] + at[1], s).view(W.shape)

    def _count(self, site: WeightSite) -> int:
        return self.r * (site.in_features + site.out_features)
