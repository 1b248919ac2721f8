"""Compacter: a bottleneck whose matrices are sums of Kronecker products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from adaptc.errors import Fault
from adaptc.methods.activation import SmallFeedForward
from adaptc.methods.method import method
from adaptc.methods.param import Param

if TYPE_CHECKING:
    from torch import Tensor

    from adaptc.methods.point_sites import SubLayer


@method("compacter")
@dataclass(frozen=True)
class Compacter(SmallFeedForward):
    """h' = h + s (W_up σ(W_down h + b_down) + b_up)    W = Σ_i A_i ⊗ s_i t_i    Karimi Mahabadi et al. 2021, section 4

    All layers share A `(n, n, n)`, n = `phm_dim`. Each layer has s_i and t_i of rank `phm_rank`: for W_down `(r, d)`
    s_i `(r / n, rank)` and t_i `(rank, d / n)`, for W_up `(d, r)` s_i `(d / n, rank)` and t_i `(rank, r / n)`.
    """

    phm_dim: Annotated[
        int, Field(gt=0, description="number of Kronecker products, and size of the left factors")
    ] = 4
    phm_rank: Annotated[int, Field(gt=0, description="rank of the right factors")] = 1

    small = {"r": 4, "phm_dim": 2, "activation": "gelu"}

    def refuses(self, site: SubLayer) -> Fault | None:
        """`phm_dim` must divide both sides of the matrices."""
        for option, size in (("r", self.r), ("phm_dim", site.shape[0])):
            if size % self.phm_dim:
                return Fault(
                    (option,),
                    f"phm_dim={self.phm_dim} does not divide {size}, a side of the bottleneck's matrices",
                )
        return super().refuses(site)

    def params(self, site: SubLayer) -> dict[str, Param]:
        """The right factors and the biases of a layer."""
        (d,), n, k = site.shape, self.phm_dim, self.phm_rank
        last = "zeros" if self.init_weights == "zero" else "normal"
        return {
            "down_left": Param((n, self.r // n, k), "kaiming-uniform", "compacter_down_left"),
            "down_right": Param((n, k, d // n), "kaiming-uniform", "compacter_down_right"),
            "down_bias": Param((self.r,), "zeros", "compacter_down.bias"),
            "up_left": Param((n, d // n, k), last, "compacter_up_left"),
            "up_right": Param((n, k, self.r // n), "kaiming-uniform", "compacter_up_right"),
            "up_bias": Param((d,), "zeros", "compacter_up.bias"),
        }

    def shared(self, sites: Sequence[SubLayer]) -> dict[str, Param]:
        """The left factors A, which all layers share."""
        return {"rule": Param((self.phm_dim,) * 3, "kaiming-uniform", "compacter_rule")}

    def matrix(self, rule: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """The matrix `Σ_i A_i ⊗ s_i t_i`: A `(n, n, n)`, s `(n, rows / n, rank)`, t `(n, rank, columns / n)`."""
        from torch import einsum

        n, rows, columns = len(rule), left.shape[1], right.shape[2]
        return einsum("iab,icd->acbd", rule, left @ right).reshape(n * rows, n * columns)

    def branch(self, z: Tensor, **theta: Tensor) -> Tensor:
        """`s (W_up σ(W_down z + b_down) + b_up)`."""
        from torch.nn.functional import linear

        down = self.matrix(theta["rule"], theta["down_left"], theta["down_right"])
        up = self.matrix(theta["rule"], theta["up_left"], theta["up_right"])
        narrow = self.activated(linear(z, down, theta["down_bias"]))
        return self.scale * linear(narrow, up, theta["up_bias"])
