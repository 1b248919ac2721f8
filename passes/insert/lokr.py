"""LoKr: low-rank adaptation by a Kronecker product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from adaptc.methods.method import method
from adaptc.methods.param import Param
from adaptc.methods.peft_format import STARTS, PeftFormat
from adaptc.methods.rank import Scaled
from adaptc.methods.tensors import unflatten

if TYPE_CHECKING:
    from torch import Tensor

    from adaptc.methods.site import WeightSite


@method("lokr")
@dataclass(frozen=True)
class Lokr(Scaled):
    """W' = W + (alpha / r) C ⊗ D        C (out1, in1)   D (out2, in2)   out = out1 out2   in = in1 in2

    Yeh et al. 2024 (LyCORIS), section 3.2. Sides are split near their square root, or near `decompose_factor`. D is a
    product of rank r where that is smaller (C too with `decompose_both`); on kernels of more than one point with
    `use_effective_conv2d` D is T (r, r, height, width) contracted with (r, out2) and (r, in2). C, or its first factor,
    starts at zero, all else Kaiming-uniform.
    """

    decompose_both: Annotated[bool, Field(description="make the left factor a low-rank product too")] = False
    decompose_factor: Annotated[
        int, Field(description="size of the left factor; -1: as square as can be")
    ] = -1
    use_effective_conv2d: Annotated[
        bool, Field(description="of a convolution, factor the kernel's sides too")
    ] = False

    small = {"r": 1}
    peft = PeftFormat(
        "LOKR",
        options={
            name: name
            for name in (
                *("r", "alpha", "rank_pattern", "alpha_pattern"),
                *("decompose_both", "decompose_factor", "use_effective_conv2d"),
            )
        },
        ignored=frozenset({"rank_dropout", "module_dropout", "rank_dropout_scale"}),
        neutral={"init_weights": (*STARTS, "lycoris")},
        layers=frozenset({"Linear", "Conv1d", "Conv2d"}),
        grouped=True,
    )

    def params(self, site: WeightSite) -> dict[str, Param]:
        """C and D, each whole, as two factors, or D as two factors and a core."""
        r, kernel = self.r, site.inner_shape[1:] if site.kind == "conv" else ()
        columns = site.inner_shape[0] if kernel else site.in_features
        (out1, out2), (in1, in2) = (divided(n, self.decompose_factor) for n in (site.out_features, columns))
        points = 1
        for size in kernel:
            points *= size
        if self.decompose_both and r < max(out1, in1) / 2:
            params = {
                "C1": Param((out1, r), "zeros", "lokr_w1_a"),
                "C2": Param((r, in1), "kaiming-uniform", "lokr_w1_b"),
            }
        else:
            params = {"C": Param((out1, in1), "zeros", "lokr_w1")}
        if r >= max(out2, in2) / 2:
            return params | {"D": Param((out2, in2, *kernel), "kaiming-uniform", "lokr_w2")}
        if self.use_effective_conv2d and points > 1:
            core = (r, r, *kernel, *(1,) * (2 - len(kernel)))
            return params | {
                "T": Param(core, "kaiming-uniform", "lokr_t2"),
                "D1": Param((r, out2), "kaiming-uniform", "lokr_w2_a"),
                "D2": Param((r, in2), "kaiming-uniform", "lokr_w2_b"),
            }
        return params | {
            "D1": Param((out2, r), "kaiming-uniform", "lokr_w2_a"),
            "D2": Param((r, in2 * points), "kaiming-uniform", "lokr_w2_b"),
        }

    def weight(self, W: Tensor, **theta: Tensor) -> Tensor:
        """W + scale C ⊗ D, of shape (out, in)."""
        C = theta["C"] if "C" in theta else theta["C1"] @ theta["C2"]
        D = theta["D"] if "D" in theta else _product(theta["D1"], theta["D2"], theta.get("T"))
        # As in PEFT, the points of a 2-D kernel stay together, and those of a 1-D one go with the columns.
        left = C[..., None, None] if D.dim() == 4 else C
        return W + self.scale * _kronecker(left, D).reshape(W.shape)


def divided(size: int, factor: int) -> tuple[int, int]:
    """Two numbers whose product is a size, the first near a factor; both near the square root for a factor of -1."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = size if factor == -1 else factor
    small = max(n for n in range(1, min(limit, int(size**0.5)) + 1) if size % n == 0)
    return small, size // small


def _product(A: Tensor, B: Tensor, T: Tensor | None) -> Tensor:
    """A B `(out, in)`; with a core T `(r, r, height, width)` its contraction with both, `(out, in, height, width)`."""
    if T is None:
        return A @ B
    r = T.shape[0]
    rows = unflatten(A.T @ T.reshape(r, -1), 1, (r, -1))  # (out, r, kernel)
    return unflatten((rows.transpose(1, 2) @ B).transpose(1, 2), 2, T.shape[2:])


def _kronecker(C: Tensor, D: Tensor) -> Tensor:
    import torch

    return torch.kron(C, D.contiguous())
