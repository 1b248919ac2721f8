"""LoHa: low-rank adaptation by a Hadamard product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from adaptc.methods.method import method
from adaptc.methods.param import Param
from adaptc.methods.peft_format import PeftFormat
from adaptc.methods.rank import Scaled
from adaptc.methods.tensors import unflatten

if TYPE_CHECKING:
    from torch import Tensor

    from adaptc.methods.site import WeightSite


@method("loha")
@dataclass(frozen=True)
class Loha(Scaled):
    """W' = W + (alpha / r) (A1 B1) ∘ (A2 B2)        A1, A2 (out, r)   B1, B2 (r, in)

    Hyeon-Woo et al. 2022 (FedPara), proposition 1: of rank up to r². With `use_effective_conv2d`, on kernels of more
    than one point, A B is T contracted with A (r, out) and B (r, in), T (r, r, height, width) (proposition 3). All
    start Kaiming-uniform but B2, which is zero.
    """

    use_effective_conv2d: Annotated[
        bool, Field(description="of a convolution, factor the kernel's sides too")
    ] = False

    peft = PeftFormat(
        "LOHA",
        options={
            name: name for name in ("r", "alpha", "rank_pattern", "alpha_pattern", "use_effective_conv2d")
        },
        ignored=frozenset({"rank_dropout", "module_dropout"}),
        layers=frozenset({"Linear", "Conv1d", "Conv2d"}),
        grouped=True,
    )

    def params(self, site: WeightSite) -> dict[str, Param]:
        """A1 and A2 (out, r), B1 and B2 (r, in); with separate kernels A (r, out) and T (r, r, height, width) too."""
        r, out, inner = self.r, site.out_features, site.in_features
        kernel = site.inner_shape[1:] if site.kind == "conv" and self.use_effective_conv2d else ()
        separate = any(size > 1 for size in kernel)
        rows, columns = ((r, out), (r, site.inner_shape[0])) if separate else ((out, r), (r, inner))
        params: dict[str, Param] = {}
        for n in "12":
            params[f"A{n}"] = Param(rows, "kaiming-uniform", f"hada_w{n}_a")
            params[f"B{n}"] = Param(columns, "kaiming-uniform" if n == "1" else "zeros", f"hada_w{n}_b")
            if separate:
                core = (r, r, *kernel, *(1,) * (2 - len(kernel)))
                params[f"T{n}"] = Param(core, "kaiming-uniform", f"hada_t{n}")
        return params

    def weight(
        self,
        W: Tensor,
        *,
        A1: Tensor,
        B1: Tensor,
        A2: Tensor,
        B2: Tensor,
        T1: Tensor | None = None,
        T2: Tensor | None = None,
    ) -> Tensor:
        """W + scale (A1 B1) ∘ (A2 B2), of shape (out, in)."""
        return W + self.scale * (_product(A1, B1, T1) * _product(A2, B2, T2))


def _product(A: Tensor, B: Tensor, T: Tensor | None) -> Tensor:
    """A B `(out, in)`; with a core T `(r, r, kernel)` its contraction with both, `(out, in kernel)`."""
    if T is None:
        return A @ B
    r = T.shape[0]
    rows = unflatten(A.T @ T.reshape(r, -1), 1, (r, -1))  # (out, r, kernel)
    return (rows.transpose(1, 2) @ B).transpose(1, 2).flatten(1)
