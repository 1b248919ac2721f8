"""C3A: circular convolution adaptation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Self

from pydantic import Field

from adaptc.errors import Fault
from adaptc.methods.method import WeightMethod, method
from adaptc.methods.param import Param
from adaptc.methods.peft_format import STARTS, LayerKey, PeftFormat, of_pattern
from adaptc.methods.site import MATRIX_KINDS
from adaptc.methods.tensors import unflatten

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from adaptc.methods.site import WeightSite

Count = Annotated[int, Field(gt=0, description="side of each circulant block")]
Pattern = Annotated[Mapping[LayerKey, Count], Field(description="layer -> its own block_size")]


@method("c3a")
@dataclass(frozen=True)
class C3a(WeightMethod):
    """W' = W + [C(k_ij)] / in        k (out / b, in / b, b);  C(k) is circulant: C(k)[t, s] = k[(s - t) mod b]

    Chen et al. 2025, section 3.3, block by block; PEFT computes the same by Fourier transforms of the
    input. The kernels start Xavier-uniform, so that the model does not start as its base.
    """

    block_size: Count = 256
    block_size_pattern: Pattern = field(default_factory=dict[str, Count])

    kinds = MATRIX_KINDS
    small = {"block_size": 2}
    identity_at_init = False
    peft = PeftFormat(
        "C3A",
        options={name: name for name in ("block_size", "block_size_pattern")},
        neutral={"init_weights": (*STARTS, "gaussian", "kaiming_uniform", "xavier_uniform")},
        layers=frozenset({"Linear"}),
    )

    def at(self, site: WeightSite) -> Self:
        """The block size of this site."""
        b = of_pattern(self.block_size_pattern, site, self.block_size)
        return replace(super().at(site), block_size=b, block_size_pattern={})

    def refuses(self, site: WeightSite) -> Fault | None:
        """The block size must divide both sides."""
        b = self.at(site).block_size
        if site.in_features % b or site.out_features % b:
            sides = f"{site.in_features} and {site.out_features}"
            return Fault(("block_size",), f"block_size must divide {sides}, got {b}")
        return None

    def params(self, site: WeightSite) -> dict[str, Param]:
        """k (out / b, in / b, b), uniform within sqrt(6 / (in + out))."""
        b, (out, inner) = self.block_size, (site.out_features, site.in_features)
        shape, bound = (out // b, inner // b, b), (6 / (inner + out)) ** 0.5

        def start(W: Tensor, generator: Generator) -> Tensor:
            return W.new_empty(shape).uniform_(-bound, bound, generator=generator)

        return {"k": Param(shape, start, "c3a_kernel")}

    def weight(self, W: Tensor, *, k: Tensor) -> Tensor:
        """W plus circulant blocks, of shape (out, in)."""
        import torch

        b = self.block_size
        at = torch.arange(b, device=k.device)
        shifts = (at.unsqueeze(0) - at.unsqueeze(1)) % b
        blocks = unflatten(k.index_select(2, shifts.flatten()), 2, (b, b))  # (out / b, in / b, b, b)
        return W + blocks.transpose(1, 2).reshape(W.shape) / W.shape[1]
