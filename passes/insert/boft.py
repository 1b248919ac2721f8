"""BOFT: orthogonal fine-tuning by butterfly factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from adaptc.errors import Fault
from adaptc.methods.method import WeightMethod, method
from adaptc.methods.param import Param
from adaptc.methods.peft_format import PeftFormat
from adaptc.methods.site import MATRIX_KINDS
from adaptc.methods.tensors import cayley, unflatten

if TYPE_CHECKING:
    from torch import Tensor

    from adaptc.methods.site import WeightSite

Count = Annotated[int, Field(ge=0)]


class BoftFormat(PeftFormat["Boft"]):
    """PEFT's configuration of BOFT."""

    def stored(self, options: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """Without its CUDA extension PEFT trains and stores one factor, and writes down the number it was given."""
        factors = {shape[0] for key, shape in shapes.items() if key.endswith(".boft_R") and shape}
        return options | ({"n_butterfly_factor": 1} if factors == {1} else {})


@method("boft")
@dataclass(frozen=True)
class Boft(WeightMethod):
    """W' = diag(s) W (M_m … M_1)ᵀ,  M_i = P_i diag(R_i1, …, R_in) P_iᵀ        X (m, n, b, b)   s (out, 1)

    Liu et al. 2024, equation 6, on the columns of W. R_ij = (I - S) (I + S)⁻¹ with S = (X - Xᵀ) / 2 of the stored X;
    P_i pairs half blocks that are 2^i blocks apart, so that m = `n_butterfly_factor` factors mix every input with
    every other. X starts at zero, s at one. PEFT runs m > 1 with its CUDA extension only; here it runs anywhere.
    """

    block_size: Annotated[int, Field(ge=0, description="4, unless block_num is given")] = 0
    block_num: Annotated[Count, Field(description="blocks of each rotation, in place of block_size")] = 0
    n_butterfly_factor: Annotated[
        int, Field(ge=1, description="rotations, each across the blocks of the last")
    ] = 1

    kinds = MATRIX_KINDS - {"embedding"}
    small = {"block_size": 2}
    aliases = {
        "boft_block_size": "block_size",
        "boft_block_num": "block_num",
        "boft_n_butterfly_factor": "n_butterfly_factor",
    }
    peft = BoftFormat(
        "BOFT",
        options={name: f"boft_{name}" for name in ("block_size", "block_num", "n_butterfly_factor")},
        ignored=frozenset({"boft_dropout"}),
        layers=frozenset({"Linear", "Conv2d"}),
        square=True,
    )

    def __post_init__(self) -> None:
        """Blocks of 4, where neither size nor number is given."""
        if not self.block_size and not self.block_num:
            object.__setattr__(self, "block_size", 4)

    def refuses(self, site: WeightSite) -> Fault | None:
        """The blocks, and for each further factor twice as many, must divide the input."""
        if self.block_size and self.block_num:
            return Fault(("block_size",), "write one of block_size and block_num")
        inner, m = site.in_features, self.n_butterfly_factor
        key, given = ("block_size", self.block_size) if self.block_size else ("block_num", self.block_num)
        if inner % given:
            return Fault((key,), f"{key} must divide {inner}, got {given}")
        b = self._block(inner)
        if m > 1 and (b % 2 or inner % (b * 2 ** (m - 1))):
            reason = (
                f"{m} factors of blocks of {b} need an even block, and {b * 2 ** (m - 1)} to divide {inner}"
            )
            return Fault(("n_butterfly_factor",), reason)
        return None

    def params(self, site: WeightSite) -> dict[str, Param]:
        """X (m, n, b, b) zero, s one for each row."""
        b = self._block(site.in_features)
        s = Param((site.out_features, 1), "ones", "boft_s")
        if site.kind == "conv":
            s = Param((1, site.out_features), "ones", "boft_s", lambda s: s.T)
        return {"X": Param((self.n_butterfly_factor, site.in_features // b, b, b), "zeros", "boft_R"), "s": s}

    def weight(self, W: Tensor, *, X: Tensor, s: Tensor) -> Tensor:
        """W's columns rotated, then its rows scaled, of shape (out, in)."""
        R = cayley((X - X.transpose(2, 3)) / 2)
        (m, n, b, _), half, rotated = X.shape, X.shape[-1] // 2, W
        for i in range(m):
            # W P_i R_iᵀ P_iᵀ; P_i exchanges two axes, which half of a block and which of 2^i blocks. P_0 is I.
            blocks, distance = n // 2**i, 2**i
            if i:
                rotated = unflatten(rotated, 1, (blocks, 2, distance, half)).transpose(2, 3).flatten(1)
            product = unflatten(rotated, 1, (n, b)).transpose(0, 1) @ R[i].transpose(1, 2)
            rotated = product.transpose(0, 1).flatten(1)
            if i:
                rotated = unflatten(rotated, 1, (blocks, distance, 2, half)).transpose(2, 3).flatten(1)
        return s * rotated

    def _block(self, size: int) -> int:
        return self.block_size or size // self.block_num
