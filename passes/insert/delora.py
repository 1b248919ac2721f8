"""DeLoRA: decoupled low-rank adaptation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Self

from pydantic import Field

from adaptc.methods.method import Dropout, method
from adaptc.methods.param import Param
from adaptc.methods.peft_format import LayerKey, PeftFormat, of_pattern
from adaptc.methods.rank import Ranked
from adaptc.methods.tensors import norm as norms

if TYPE_CHECKING:
    from torch import Tensor

    from adaptc.methods.site import WeightSite

Boundary = Annotated[float, Field(description="how far the change may go: λ at the start")]
Pattern = Annotated[Mapping[LayerKey, Boundary], Field(description="layer -> its own lambda_")]


@method("delora")
@dataclass(frozen=True)
class Delora(Ranked):
    """W' = W + (λ / r) B Ξ A diag(w)        A (r, in)   B (out, r)   λ (1,)   w (in,) frozen

    Bini et al. 2025, equations 7 and 8: Ξ divides each rank i by ‖A_i‖ ‖B_i‖, and w are the norms of W's columns, so
    that λ alone bounds the change. A starts Kaiming-uniform, B at zero.
    """

    lambda_: Boundary = 15.0
    dropout: Dropout = 0.0
    lambda_pattern: Pattern = field(default_factory=dict[str, Boundary])

    aliases = {
        "delora_lambda": "lambda_",
        "lambda": "lambda_",
        "module_dropout": "dropout",
    }
    peft = PeftFormat(
        "DELORA",
        options={
            "r": "r",
            "lambda_": "delora_lambda",
            "dropout": "module_dropout",
            "rank_pattern": "rank_pattern",
            "lambda_pattern": "lambda_pattern",
        },
        layers=frozenset({"Linear"}),
    )

    def at(self, site: WeightSite) -> Self:
        """The rank and λ of this site."""
        lambda_ = of_pattern(self.lambda_pattern, site, self.lambda_)
        return replace(super().at(site), lambda_=lambda_, lambda_pattern={})

    def params(self, site: WeightSite) -> dict[str, Param]:
        """A (r, in) Kaiming-uniform, B (out, r) zero, λ (1,), w (in,) the norms of W's columns."""
        r, out, inner = self.r, site.out_features, site.in_features
        return {
            "A": Param((r, inner), "kaiming-uniform", "delora_A"),
            "B": Param((out, r), "zeros", "delora_B"),
            "bound": Param((1,), lambda W, _: W.new_full((1,), self.lambda_), "delora_lambda"),
            "norm": Param((inner,), lambda W, _: norms(W, 0), "delora_w_norm", trained=False),
        }

    def weight(self, W: Tensor, *, A: Tensor, B: Tensor, bound: Tensor, norm: Tensor) -> Tensor:
        """W + (λ / r) B Ξ A diag(w), of shape (out, in)."""
        lengths = norms(A, 1).clamp_min(1e-4) * norms(B, 0).clamp_min(1e-4)
        return W + B @ ((bound / self.r / lengths).unsqueeze(1) * (A * norm))
