"""GPTQ: integers whose rounding errors later columns make up for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from adaptc.quantization.integer import BlockSize, CalibratedBlocks, Symmetric
from adaptc.quantization.scheme import StoredTensor, Tensors, scheme

if TYPE_CHECKING:
    from torch import Tensor

Damping = Annotated[
    float, Field(gt=0, lt=1, description="added to the diagonal of xᵀx, as a part of its mean")
]
ActOrder = Annotated[bool, Field(description="round the columns that meet the largest inputs first")]
AT_ONCE = 128
"""Columns whose errors reach those behind them in one product, where a block is a whole row."""


@scheme("gptq")
@dataclass(frozen=True)
class Gptq(CalibratedBlocks):
    """W = scales (codes - zeros)        least ‖x W_floatᵀ - x Wᵀ‖² column by column, x (tokens, in) of `calibration`

    Frantar et al. 2023, algorithm 1: columns are rounded in their order; the error of each is spread over those not
    rounded yet, by the Cholesky factor of (xᵀx + damping)⁻¹. A block's range is that of its weights as they have
    become by then. With `act_order` columns are stored in the order in which they are rounded, from the largest xᵀx
    on, and the inputs of the product put into that order.
    """

    block_size: BlockSize = 128
    symmetric: Symmetric = False
    damping: Damping = 0.01
    act_order: ActOrder = False

    aliases: ClassVar[Mapping[str, str]] = {"desc_act": "act_order"}

    def stored(self, rows: int, columns: int) -> dict[str, StoredTensor]:
        """What integers are, and which column of W each stored one is."""
        order = {"order": StoredTensor((columns,), "int32")} if self.act_order else {}
        return super().stored(rows, columns) | order

    def quantize(self, W: Tensor, inputs: Tensor | None = None) -> dict[str, Tensor]:
        """Round, and make up for it."""
        import torch

        assert inputs is not None
        if not self.act_order:
            return self._rounded(W, inputs)
        order = inputs.square().sum(0).argsort(descending=True, stable=True)
        return self._rounded(W[:, order], inputs[:, order]) | {"order": order.to(torch.int32)}

    def entering(self, x: Tensor, tensors: Tensors) -> Tensor:
        """The inputs in the order of the stored columns."""
        return x.index_select(-1, tensors["order"]) if self.act_order else x

    def leaving(self, W: Tensor, tensors: Tensors) -> Tensor:
        """The columns in the order of the inputs."""
        return W.index_select(-1, tensors["order"].argsort()) if self.act_order else W

    def _rounded(self, W: Tensor, inputs: Tensor) -> dict[str, Tensor]:
        import torch

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
