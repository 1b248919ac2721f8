"""RandLoRA: full-rank adaptation by sums of random low-rank products."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from adaptc.methods.method import Alpha, Dropout, Rank, WeightMethod, method
from adaptc.methods.param import Param
from adaptc.methods.peft_format import PeftFormat
from adaptc.methods.site import MATRIX_KINDS

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from adaptc.methods.site import WeightSite


@method("randlora")
@dataclass(frozen=True)
class Randlora(WeightMethod):
    """W' = W + (alpha / r) Σ_j B_j diag(l_j) A diag(g_j)        l (r, n)   g (n, min)

    Albert et al. 2025, equation 4; min and max are the sides of W, n = ⌈min / r⌉ makes the sum of full rank, and the
    sum is transposed where W has fewer rows than columns. A and B are drawn once for all layers (Kaiming-uniform at
    unit deviation, or -1, 0, 1 with `sparse` and `very_sparse`). l starts at zero, all of g equal. PEFT pairs the terms
    of B and A in another order than the paper, (j, r) with (r, j), and so does adaptc.
    """

    r: Rank = 32
    alpha: Alpha = 640.0
    dropout: Dropout = 0.0
    projection_prng_key: Annotated[int, Field(description="seed of the random bases")] = 0
    save_projection: Annotated[bool, Field(description="save the bases, or draw them again")] = True
    sparse: Annotated[bool, Field(description="random bases of -1, 0 and 1")] = False
    very_sparse: Annotated[bool, Field(description="as sparse, with fewer that are not 0")] = False

    kinds = MATRIX_KINDS
    small = {"alpha": 20.0}
    aliases = {"randlora_alpha": "alpha", "randlora_dropout": "dropout"}
    peft = PeftFormat(
        "RANDLORA",
        options={
            "alpha": "randlora_alpha",
            "dropout": "randlora_dropout",
            **{n: n for n in ("r", "projection_prng_key", "save_projection", "sparse", "very_sparse")},
        },
    )

    def params(self, site: WeightSite) -> dict[str, Param]:
        """l (r, n) zero, g (n, min) one over its longer side."""
        short = min(site.in_features, site.out_features)
        n = -(-short // self.r)
        return {
            "l": Param((self.r, n), "zeros", "randlora_lambda"),
            "g": Param((n, short), lambda W, _: W.new_full((n, short), 1 / max(n, short)), "randlora_gamma"),
        }

    def shared(self, sites: Sequence[WeightSite]) -> dict[str, Param]:
        """A (r, 1, min) and B (max, n, r) for the largest number of rows and of columns."""
        sides = [max(s.in_features for s in sites), max(s.out_features for s in sites)]
        short, long = sorted(sides)
        shapes = {"A": (self.r, 1, short), "B": (long, -(-short // self.r), self.r)}

        def base(name: str) -> Param:
            def start(_: Tensor, __: Generator) -> Tensor:
                return self._bases(shapes)[name]

            return Param(shapes[name], start, f"randlora_{name}", trained=False, stored=self.save_projection)

        return {name: base(name) for name in shapes}

    def weight(self, W: Tensor, *, l: Tensor, g: Tensor, A: Tensor, B: Tensor) -> Tensor:  # noqa: E741
        """W + (alpha / r) Σ_j B_j diag(l_j) A diag(g_j), of shape (out, in)."""
        (out, inner), n = W.shape, l.shape[1]
        right = (l.unsqueeze(2) * A[:, :, : min(out, inner)] * g).flatten(0, 1)
        left = B[: max(out, inner), :n].flatten(1)
        product = left @ right if inner <= out else right.T @ left.T
        return W + self.alpha / self.r * product

    def _bases(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """A and B of these shapes, drawn from the seed, of unit deviation."""
        import torch

        generator = torch.Generator().manual_seed(self.projection_prng_key)
        if self.sparse or self.very_sparse:
            share = 1 / (2 * (math.sqrt(shapes["A"][2]) if self.very_sparse else 3))
            drawn = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
            bases = {name: (u > 1 - share).float() - (u < share).float() for name, u in drawn.items()}
        else:

            def uniform(*shape: int) -> Tensor:
                # In bfloat16, as PEFT draws them.
                bound = math.prod(shape[1:]) ** -0.5
                return torch.empty(shape, dtype=torch.bfloat16).uniform_(-bound, bound, generator=generator)

            long, n, r = shapes["B"]
            bases = {
                "A": uniform(*shapes["A"]),
                "B": torch.cat([uniform(long, 1, r) for _ in range(n)], dim=1),
            }
        return {name: (base / base.std()).float() for name, base in bases.items()}
