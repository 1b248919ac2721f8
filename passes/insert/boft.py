"""BOFT: orthogonal fine-tuning by butterfly factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from adaptc.errors import Fault
from adaptc.methods.method import WeightMethod, method
from adaptc.methods.param import Param
from adaptc.methods.peft_format import PeftFormat
from adaptc.methods.site import MATRIX_KINDS

if TYPE_CHECKING:
    from torch import Tensor

    from adaptc.methods.site import WeightSite

Count = Annotated[int, Field(ge=0)]


@method("boft")
@dataclass(frozen=True)
class Boft(WeightMethod):
    """W' = diag(s) W (M_m … M_1)ᵀ,  M_i = P_i diag(R_i1, …, R_in) P_iᵀ        X (m, n, b, b)   s (out, 1)

    Liu et al. 2024, equation 6, on the columns of W. R_ij = (I - S) (I + S)⁻¹ with S = (X - Xᵀ) / 2 of the stored X;
    P_i sorts halves of blocks, 2^i of them apart, so that m = `n_butterfly_factor` factors turn every input into
    every other. X starts at zero, s at one. PEFT runs m > 1 with its CUDA extension only; here it runs anywhere.
    """

    block_size: Annotated[int, Field(ge=0, description="4, unless block_num is given")] = 0
    block_num: Count = 0
    n_butterfly_factor: Annotated[int, Field(ge=1)] = 1

    kinds: ClassVar[frozenset[str]] = MATRIX_KINDS - {"embedding"}
    small: ClassVar[Mapping[str, object]] = {"block_size": 2}
    aliases: ClassVar[Mapping[str, str]] = {
        "boft_block_size": "block_size",
        "boft_block_num": "block_num",
        "boft_n_butterfly_factor": "n_butterfly_factor",
    }
    peft: ClassVar[PeftFormat[Any] | None] = PeftFormat(
        "BOFT",
        options={name: f"boft_{name}" for name in ("block_size", "block_num", "n_butterfly_factor")},
        ignored=frozenset({"boft_dropout"}),
        layers=frozenset({"Linear", "Conv2d"}),
        square=True,
    )

    def __post_init__(self) -> None:
        """Blocks of 4, if nothing is said."""
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
            words = (
                f"{m} factors of blocks of {b} need an even block, and {b * 2 ** (m - 1)} to divide {inner}"
            )
            return Fault(("n_butterfly_factor",), words)
        return None

    def params(self, site: WeightSite) -> dict[str, Param]:
        """X (m, n, b, b) zero, s one for each row."""
        b = self._block(site.in_features)
        s = Param((site.out_features, 1), "ones", "boft_s")
        if site.kind == "conv":
            s = Param((1, site.out_features), "ones", "boft_s", lambda s: s.T)
        return {"X": Param((self.n_butterfly_factor, site.in_features // b, b, b), "zeros", "boft_R"), "s": s}

    def weight(self, W: Tensor, *, X: Tensor, s: Tensor) -> Tensor:
        """W's columns turned, then its rows scaled, of shape (out, in)."""
        import torch

        skew = (X - X.transpose(2, 3)) / 2
        identity = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
        left, right = identity + skew, identity - skew
        if X.dtype.itemsize == 2:  # there is no solver for narrow numbers
            left, right = left.float(), right.float()
        R = torch.linalg.solve_ex(left, right, left=False)[0].to(X.dtype)
        (m, n, b, _), half = X.shape, X.shape[-1] // 2
        for i in range(m):
            # W P_i R_iᵀ P_iᵀ; P_i swaps which half of a block, and which of 2^i blocks, and is none for i = 0.
            blocks, apart = n // 2**i, 2**i
            if i:
                W = W.unflatten(1, (blocks, 2, apart, half)).transpose(2, 3).flatten(1)
            W = (W.unflatten(1, (n, b)).transpose(0, 1) @ R[i].transpose(1, 2)).transpose(0, 1).flatten(1)
            if i:
                W = W.unflatten(1, (blocks, apart, 2, half)).transpose(2, 3).flatten(1)
        return s * W

    def _block(self, size: int) -> int:
        return self.block_size or size // self.block_num
