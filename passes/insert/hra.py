"""HRA: Householder reflection adaptation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from adaptc.errors import Fault
from adaptc.methods.method import Rank, WeightMethod, method
from adaptc.methods.param import Param
from adaptc.methods.peft_format import PeftFormat
from adaptc.methods.site import MATRIX_KINDS
from adaptc.methods.tensors import norm

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from adaptc.methods.site import WeightSite

GramSchmidt = Annotated[bool, Field(description="make the reflections orthogonal to one another")]


@method("hra")
@dataclass(frozen=True)
class Hra(WeightMethod):
    """W' = W H_1 … H_r,  H_i = I - 2 u_i u_iᵀ / ‖u_i‖²        u (in, r)

    Yuan et al. 2024, equation 3. The product is I - U S Uᵀ with U the unit vectors and S⁻¹ = I / 2 + the upper
    triangle of UᵀU (Schreiber and Van Loan 1989), so that nothing larger than (in, r) is built. With `apply_GS` U is
    made orthogonal first, and S = 2 I. The u start Kaiming-uniform and equal in pairs, so that they cancel.
    """

    r: Rank = 8
    apply_GS: GramSchmidt = False  # noqa: N815 (PEFT's spelling)

    kinds = MATRIX_KINDS
    peft = PeftFormat(
        "HRA",
        options={"r": "r", "apply_GS": "apply_GS"},
        layers=frozenset({"Linear", "Conv2d"}),
        square=True,
    )

    def refuses_to_train(self, site: WeightSite) -> Fault | None:
        """Reflections start in pairs that cancel, and no more than W has columns are independent."""
        if self.r % 2:
            return Fault(
                ("r",), f"r must be even, since reflections start in pairs that cancel, got {self.r}"
            )
        if self.apply_GS:
            return Fault(
                ("apply_GS",),
                "equal pairs cannot be made orthogonal, so such reflections do not start as the base",
            )
        if self.r > site.in_features:
            return Fault(
                ("r",),
                f"rank r must be at most {site.in_features} here, got {self.r}",
                (f"leave the layer out: exclude: [{site.module}]",),
            )
        return None

    def params(self, site: WeightSite) -> dict[str, Param]:
        """u (in, r), every second column equal to the one before."""
        shape = (site.in_features, self.r)

        def pairs(_: Tensor, generator: Generator) -> Tensor:
            import torch

            half = torch.empty(shape[0], -(-shape[1] // 2))
            torch.nn.init.kaiming_uniform_(half, a=5**0.5, generator=generator)
            return half.repeat_interleave(2, dim=1)[:, : shape[1]]

        return {"u": Param(shape, pairs, "hra_u")}

    def weight(self, W: Tensor, *, u: Tensor) -> Tensor:
        """W + (W U) (-S Uᵀ), of shape (out, in)."""
        if self.apply_GS:
            Q = _orthogonal(u)
            return W + (W @ Q) @ (-2 * Q.T)
        U = u / norm(u, 0)
        return W + (W @ U) @ (_inverse((U.T @ U).triu(1) * 2) * -2 @ U.T)


def _inverse(N: Tensor) -> Tensor:
    """(I + N)⁻¹ of a strictly upper triangular N: (I - N) (I + N²) (I + N⁴) …, which ends, since N^r = 0."""
    import torch

    identity = torch.eye(len(N), dtype=N.dtype, device=N.device)
    inverse, power, exponent = identity - N, N, 1
    while 2 * exponent < len(N):
        power, exponent = power @ power, 2 * exponent
        inverse = inverse @ (identity + power)
    return inverse


def _orthogonal(u: Tensor) -> Tensor:
    """Gram-Schmidt: each column of u (in, r) minus its projections on the earlier ones, at unit length."""
    import torch

    basis = u[:, :1] / norm(u[:, :1])
    for column in torch.split(u[:, 1:], 1, dim=1):
        rest = column - basis @ (basis.T @ column)
        basis = torch.cat([basis, rest / norm(rest)], dim=1)
    return basis
