"""What methods with a rank share: its limit, the rank and alpha of each layer, how checkpoints hold A and B."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Self

from pydantic import Field

from adaptc.errors import Fault
from adaptc.methods.method import Alpha, Rank, WeightMethod
from adaptc.methods.param import Param
from adaptc.methods.peft_format import LayerKey, matches_peft_key, of_pattern, peft_name
from adaptc.methods.site import MATRIX_KINDS
from adaptc.methods.tensors import unflatten

if TYPE_CHECKING:
    from adaptc.methods.site import WeightSite

RankPattern = Annotated[
    Mapping[LayerKey, Rank], Field(description="the end of a layer's name, or a regex, -> the rank there")
]
AlphaPattern = Annotated[
    Mapping[LayerKey, Alpha], Field(description="the end of a layer's name, or a regex, -> alpha there")
]


@dataclass(frozen=True)
class Ranked(WeightMethod):
    """A method with a rank; PEFT's `rank_pattern` sets it for single layers."""

    r: Rank = 8
    rank_pattern: RankPattern = field(default_factory=dict[str, Rank])

    kinds = MATRIX_KINDS

    def at(self, site: WeightSite) -> Self:
        """The rank in force at this site: patterns first, then the entry's own."""
        return replace(super().at(site), r=of_pattern(self.rank_pattern, site, self.r), rank_pattern={})

    def refuses_to_train(self, site: WeightSite) -> Fault | None:
        """A rank above the smaller side of the weight adds parameters and no freedom."""
        limit, rank = min(site.in_features, site.out_features), self.at(site).r
        if rank <= limit:
            return super().refuses_to_train(site)
        key = next((key for key in self.rank_pattern if matches_peft_key(key, peft_name(site))), None)
        place = ("r",) if key is None else ("rank_pattern", key)
        return Fault(
            place,
            f"rank r must be at most {limit} here, got {rank}",
            (
                f"leave the layer out: exclude: [{site.module}]",
                f"or give it a rank of its own: rank_pattern: {{{peft_name(site)}: {limit}}}",
            ),
        )


@dataclass(frozen=True)
class Scaled(Ranked):
    """A method whose product is scaled by alpha / r; PEFT's `alpha_pattern` sets alpha for single layers."""

    alpha: Alpha = 8.0
    alpha_pattern: AlphaPattern = field(default_factory=dict[str, Alpha])

    def at(self, site: WeightSite) -> Self:
        """The rank and alpha in force at this site."""
        return replace(super().at(site), alpha=self.alpha_at(peft_name(site)), alpha_pattern={})

    def alpha_at(self, name: str) -> float:
        """The alpha of a layer, by the layer's name."""
        return next((v for k, v in self.alpha_pattern.items() if matches_peft_key(k, name)), self.alpha)

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.r


def factors(site: WeightSite, r: int, as_kernels: bool, key: str, embedding: str) -> dict[str, Param]:
    """A (r, in) and B (out, r) as PEFT names, shapes and initialises them on each kind of site; B A starts at zero.

    Args:
        site: the layer. For fused experts all matrices are in one tensor: A (experts r, in), B (out, r experts).
        r: the rank.
        as_kernels: whether a convolution's A and B are kernels, as PEFT stores them.
        key: the key in checkpoints, where {} is the letter A or B.
        embedding: the key for an embedding.
    """
    out, inner, keys = site.out_features, site.in_features, (key.format("A"), key.format("B"))
    if site.kind == "embedding":
        return {
            "A": Param((r, inner), "zeros", embedding.format("A")),
            "B": Param((out, r), "standard-normal", embedding.format("B")),
        }
    if site.kind == "conv" and as_kernels:
        ones = (1,) * (len(site.shape) - 2)
        return {
            "A": Param((r, *site.inner_shape), "kaiming-uniform", keys[0], lambda A: A.flatten(1)),
            "B": Param((out, r, *ones), "zeros", keys[1], lambda B: B.flatten(1)),
        }
    if site.batch is not None:
        n = site.batch
        return {
            "A": Param((n * r, inner), "kaiming-uniform", keys[0], lambda A: unflatten(A, 0, (n, r))),
            "B": Param((out, r * n), "zeros", keys[1], lambda B: unflatten(B, 1, (r, n)).permute(2, 0, 1)),
        }
    return {"A": Param((r, inner), "kaiming-uniform", keys[0]), "B": Param((out, r), "zeros", keys[1])}
