"""GPTQ: integers whose rounding errors later columns make up for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from adaptc.integer_blocks import BlockSize, CalibratedBlocks, Symmetric
from adaptc.scheme import scheme

if TYPE_CHECKING:
    from torch import Tensor

Damping = Annotated[
    float, Field(gt=0, lt=1, description="added to the diagonal of xᵀx, as a part of its mean")
]
AT_ONCE = 128
"""Columns whose errors reach those behind them in one product, where a block is a whole row."""


@scheme("gptq")
@dataclass(frozen=True)
class Gptq(CalibratedBlocks):
    """W = scales (codes - zeros)        least ‖x W_floatᵀ - x Wᵀ‖² column by column, x (tokens, in) of `calibration`

    Frantar et al. 2023, algorithm 1: columns are rounded in their order; the error of each is spread over those not
    rounded yet, by the Cholesky factor of (xᵀx + damping)⁻¹. A block's range is that of its weights as they have
    become by then.
    """

    block_size: BlockSize = 128
    symmetric: Symmetric = False
    damping: Damping = 0.01

    def quantize(self, W: Tensor, inputs: Tensor | None = None) -> dict[str, Tensor]:
        """Round, and make up for it."""
        import torch

        assert inputs is not None
        W, columns = W.clone(), W.shape[1]
        factor = _factor(inputs, self.damping)
        block = min(self.block(columns), columns)
        found, ranges = torch.empty_like(W), []
        for start in range(0, columns, block):
            stop = min(start + block, columns)
            scales, zeros = self.ranges(W[:, start:stop])
            ranges.append((scales, zeros))
            for first in range(start, stop, AT_ONCE):
                last = min(first + AT_ONCE, stop)
                errors = torch.empty_like(W[:, first:last])
                for i in range(first, last):
                    codes = self.rounded(W[:, i : i + 1], scales, zeros)
                    found[:, i : i + 1] = codes
                    error = (W[:, i : i + 1] - scales * (codes - zeros)) / factor[i, i]
                    W[:, i:last] -= error * factor[i, i:last]
                    errors[:, i - first] = error.squeeze(1)
                W[:, last:] -= errors @ factor[first:last, last:]
        scales, zeros = (torch.stack(parts, 1) for parts in zip(*ranges, strict=True))
        return self.packed(self.blocked(found), scales, zeros)


def _factor(x: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of (xᵀx + damping mean)⁻¹."""
    import torch

    H = x.double().t() @ x.double()
    mean = H.diagonal().mean().clamp(min=1e-30)
    H.diagonal().add_(damping * mean)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H))
    return torch.linalg.cholesky(inverse, upper=True).float()
