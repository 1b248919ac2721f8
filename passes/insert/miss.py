"""MiSS: matrix shard sharing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from adaptc.errors import Fault
from adaptc.methods.method import Dropout, Rank, WeightMethod, method
from adaptc.methods.param import Param
from adaptc.methods.peft_format import PeftFormat
from adaptc.methods.site import MATRIX_KINDS
from adaptc.methods.tensors import unflatten

if TYPE_CHECKING:
    from torch import Tensor

    from adaptc.methods.site import WeightSite

Form = Annotated[
    Literal[True, "bat", "mini"],
    Field(description='true: one shard; "bat": multiplied with W too; "mini": shared along the rows as well'),
]


@method("miss")
@dataclass(frozen=True)
class Miss(WeightMethod):
    """W' = W + [Bᵀ Bᵀ … Bᵀ]        B (r, out), repeated over blocks of r columns

    Kang and Yin 2025, equation 5. With `init_weights` "mini" B is (r, mini_r), repeated along the rows too; with
    "bat" each block X of r rows and r columns becomes X + X B + B, B (out / r, r, r). B starts at zero.
    """

    r: Rank = 64
    mini_r: Rank = 1
    dropout: Dropout = 0.0
    init_weights: Form = True

    kinds = MATRIX_KINDS
    aliases = {"miss_dropout": "dropout"}
    peft = PeftFormat(
        "MISS",
        options={"r": "r", "mini_r": "mini_r", "dropout": "miss_dropout", "init_weights": "init_weights"},
        layers=frozenset({"Linear"}),
    )

    def refuses(self, site: WeightSite) -> Fault | None:
        """A block must not be larger than W; `bat` needs blocks that divide W, and has no dropout."""
        out, inner = site.out_features, site.in_features
        if self.r > inner:
            return Fault(("r",), f"r must be at most {inner} here, got {self.r}")
        if self.init_weights == "bat" and (inner % self.r or out % self.r):
            return Fault(("r",), f"bat needs r to divide {inner} and {out}, got {self.r}")
        if self.init_weights == "bat" and self.dropout:
            return Fault(("dropout",), "bat has no branch that dropout could go in front of: leave it out")
        if self.init_weights == "mini" and out % self.mini_r:
            return Fault(("mini_r",), f"mini_r must divide {out}, got {self.mini_r}")
        return None

    def params(self, site: WeightSite) -> dict[str, Param]:
        """B, zero."""
        shapes = {True: (self.r, site.out_features), "mini": (self.r, self.mini_r)}
        shape = shapes.get(self.init_weights) or (site.out_features // self.r, self.r, self.r)
        return {"B": Param(shape, "zeros", "miss_block")}

    def weight(self, W: Tensor, *, B: Tensor) -> Tensor:
        """W plus the repeated shard, of shape (out, in)."""
        import torch

        (out, inner), r = W.shape, self.r
        if self.init_weights == "bat":
            blocks = unflatten(unflatten(W, 1, (inner // r, r)), 0, (out // r, r)).permute(2, 0, 1, 3)
            return W + (blocks @ B + B).permute(1, 2, 0, 3).reshape(out, inner)
        shard = B.repeat(1, out // self.mini_r) if self.init_weights == "mini" else B
        # As a product, so that x is summed over the blocks and no full matrix is built.
        repeated = torch.eye(r, dtype=W.dtype, device=W.device).repeat(1, -(-inner // r))[:, :inner]
        return W + shard.T @ repeated
