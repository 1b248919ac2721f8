"""VeRA: vector-based random matrix adaptation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from adaptc.methods.method import Dropout, Rank, WeightMethod, method
from adaptc.methods.param import Param
from adaptc.methods.peft_format import PeftFormat
from adaptc.methods.site import MATRIX_KINDS

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from adaptc.methods.site import WeightSite


@method("vera")
@dataclass(frozen=True)
class Vera(WeightMethod):
    """W' = W + diag(b) B diag(d) A        d (r,)   b (out,)   A (r, in) and B (out, r) frozen

    Kopiczko et al. 2024, equation 2. A and B are drawn once (Kaiming-uniform, from `projection_prng_key`) for all
    layers, as large as the largest needs; each layer takes their first rows and columns. b starts at zero, d at
    `d_initial`. With `save_projection` false, checkpoints leave A and B out: they are drawn again.
    """

    r: Rank = 256
    dropout: Dropout = 0.0
    d_initial: Annotated[float, Field(description="what d starts at")] = 0.1
    projection_prng_key: Annotated[int, Field(description="seed of the random A and B")] = 0
    save_projection: Annotated[bool, Field(description="save A and B, or draw them again")] = True

    kinds = MATRIX_KINDS
    aliases = {"vera_dropout": "dropout"}
    peft = PeftFormat(
        "VERA",
        options={
            "r": "r",
            "dropout": "vera_dropout",
            "d_initial": "d_initial",
            "projection_prng_key": "projection_prng_key",
            "save_projection": "save_projection",
        },
    )

    def params(self, site: WeightSite) -> dict[str, Param]:
        """d (r,) at `d_initial`, b (out,) zero."""
        return {
            "d": Param((self.r,), lambda W, _: W.new_full((self.r,), self.d_initial), "vera_lambda_d"),
            "b": Param((site.out_features,), "zeros", "vera_lambda_b"),
        }

    def shared(self, sites: Sequence[WeightSite]) -> dict[str, Param]:
        """A (r, largest in) and B (largest out, r), drawn one after the other."""
        inner, outer = max(s.in_features for s in sites), max(s.out_features for s in sites)
        shapes = {"A": (self.r, inner), "B": (outer, self.r)}

        def projection(name: str) -> Param:
            def start(_: Tensor, __: Generator) -> Tensor:
                import torch

                generator = torch.Generator().manual_seed(self.projection_prng_key)
                return {k: _uniform(torch.empty(shape), generator) for k, shape in shapes.items()}[name]

            return Param(shapes[name], start, f"vera_{name}", trained=False, stored=self.save_projection)

        return {name: projection(name) for name in shapes}

    def weight(self, W: Tensor, *, d: Tensor, b: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """W + diag(b) B diag(d) A, of shape (out, in)."""
        out, inner = W.shape
        return W + (b.unsqueeze(1) * B[:out]) @ (d.unsqueeze(1) * A[:, :inner])


def _uniform(tensor: Tensor, generator: Generator) -> Tensor:
    """A tensor (out, in) filled within Kaiming's bound for a ReLU, sqrt(6 / in)."""
    bound = math.sqrt(6 / tensor.shape[1])
    return tensor.uniform_(-bound, bound, generator=generator)
