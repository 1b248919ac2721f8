"""GraLoRA: granular low-rank adaptation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from adaptc.errors import Fault
from adaptc.methods.method import Alpha, Dropout, Rank, WeightMethod, method
from adaptc.methods.param import Param
from adaptc.methods.peft_format import PeftFormat
from adaptc.methods.site import MATRIX_KINDS
from adaptc.methods.tensors import unflatten

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from adaptc.methods.site import WeightSite

Blocks = Annotated[int, Field(gt=0, description="blocks along each side of the weight")]


@method("gralora")
@dataclass(frozen=True)
class Gralora(WeightMethod):
    """W' = W + s ([B_ij A_ij] + D C),  s = alpha / (r + hybrid_r)        A (k, in / k, r)   B (k, r, out / k)

    Jung et al. 2025, equation 6: each of the k x k blocks of W gets a low-rank product of rank r / k, so that the sum
    has rank up to k r. With `hybrid_r`, LoRA's C (hybrid_r, in) and D (out, hybrid_r) are added. A_ij are the
    i-th r / k columns of A_j, B_ij the j-th rows of B_i. A and C start Kaiming-uniform, B and D at zero.
    """

    r: Rank = 32
    hybrid_r: Annotated[int, Field(ge=0, description="rank of a plain LoRA that is added")] = 0
    alpha: Alpha = 64.0
    k: Blocks = 2
    dropout: Dropout = 0.0

    kinds = MATRIX_KINDS
    aliases = {"gralora_k": "k", "gralora_dropout": "dropout"}
    fast = frozenset({"B", "D"})
    small = {"r": 2, "hybrid_r": 1}
    peft = PeftFormat(
        "GRALORA",
        options={
            "k": "gralora_k",
            "dropout": "gralora_dropout",
            **{name: name for name in ("r", "hybrid_r", "alpha")},
        },
    )

    def refuses(self, site: WeightSite) -> Fault | None:
        """k must divide both sides and the rank."""
        sides = {"in": site.in_features, "out": site.out_features, "r": self.r}
        wrong = next((name for name, size in sides.items() if size % self.k), None)
        return Fault(("k",), f"k must divide {wrong} ({sides[wrong]}), got {self.k}") if wrong else None

    def params(self, site: WeightSite) -> dict[str, Param]:
        """A and B of all blocks, C and D of the whole."""
        k, r, inner, out = self.k, self.r, site.in_features, site.out_features

        def start(W: Tensor, generator: Generator) -> Tensor:
            # Kaiming-uniform for (r, in / k).
            bound = (inner // k) ** -0.5
            return W.new_empty(k, inner // k, r).uniform_(-bound, bound, generator=generator)

        params = {
            "A": Param((k, inner // k, r), start, "gralora_A"),
            "B": Param((k, r, out // k), "zeros", "gralora_B"),
        }
        if self.hybrid_r:
            params["C"] = Param((self.hybrid_r, inner), "kaiming-uniform", "gralora_A_general.weight")
            params["D"] = Param((out, self.hybrid_r), "zeros", "gralora_B_general.weight")
        return params

    def weight(
        self, W: Tensor, *, A: Tensor, B: Tensor, C: Tensor | None = None, D: Tensor | None = None
    ) -> Tensor:
        """W + s ([B_ij A_ij] + D C), of shape (out, in)."""
        import torch

        k = self.k
        blocks = torch.einsum("ijso,jais->ioja", unflatten(B, 1, (k, -1)), unflatten(A, 2, (k, -1)))
        scale = self.alpha / (self.r + self.hybrid_r)
        local = W + scale * blocks.reshape(W.shape)
        return local if C is None or D is None else local + scale * (D @ C)
