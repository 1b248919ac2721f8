"""GPTQ: integers whose rounding errors later columns compensate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, cast

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
"""Columns whose errors reach the later columns in one matrix product, where a block is a whole row: algorithm 1's
block size B, 128 in the paper too."""


SMALLEST_MEAN = 1e-30
"""The smallest mean of a diagonal, so that inputs of zeros give a matrix that can be inverted."""


@scheme("gptq")
@dataclass(frozen=True)
class Gptq(CalibratedBlocks):
    """W = scales (codes - zeros)        least ‖x W_floatᵀ - x Wᵀ‖² column by column, x (tokens, in) of `calibration`

    Frantar et al. 2023, algorithm 1: columns are rounded in their order; the error of each is spread over those not
    rounded yet, by the Cholesky factor of (xᵀx + damping)⁻¹. A block's range is that of its weights with the errors of
    earlier columns spread over them. With `act_order` columns are stored in the order in which they are rounded, from
    the largest xᵀx on, and the inputs of the product are put into that order.
    """

    block_size: BlockSize = 128
    symmetric: Symmetric = False
    damping: Damping = 0.01
    act_order: ActOrder = False

    aliases: ClassVar[Mapping[str, str]] = {"desc_act": "act_order"}

    def stored(self, rows: int, columns: int) -> dict[str, StoredTensor]:
        """What integers in blocks store; with `act_order` also `order`, the column of W that each stored column is."""
        order = {"order": StoredTensor((columns,), "int32")} if self.act_order else {}
        return super().stored(rows, columns) | order

    def quantize(self, W: Tensor, inputs: Tensor | None = None) -> dict[str, Tensor]:
        """Round column by column, and compensate each error in the later columns."""
        import torch

        assert inputs is not None
        if not self.act_order:
            return self._rounded(W, inputs)
        order = inputs.square().sum(0).argsort(descending=True, stable=True)
        return self._rounded(W[:, order], inputs[:, order]) | {"order": order.to(torch.int32)}

    def transformed_inputs(self, x: Tensor, tensors: Tensors) -> Tensor:
        """The inputs in the order of the stored columns."""
        return x.index_select(-1, tensors["order"]) if self.act_order else x

    def restored(self, S: Tensor, tensors: Tensors) -> Tensor:
        """The columns of S in the order of the inputs."""
        return S.index_select(-1, tensors["order"].argsort()) if self.act_order else S

    def _rounded(self, W: Tensor, inputs: Tensor) -> dict[str, Tensor]:
        import torch

        remaining, columns = W.clone(), W.shape[1]
        factor = _factor(inputs, self.damping)
        block = min(self.block(columns), columns)
        codes = torch.empty_like(W)
        ranges: list[tuple[Tensor, Tensor]] = []
        for start in range(0, columns, block):
            stop = min(start + block, columns)
            scales, zeros = self.ranges(remaining[:, start:stop])
            ranges.append((scales, zeros))
            for first in range(start, stop, AT_ONCE):
                last = min(first + AT_ONCE, stop)
                errors = torch.empty_like(remaining[:, first:last])
                for i in range(first, last):
                    column = remaining[:, i : i + 1]
                    rounded = self.rounded(column, scales, zeros)
                    codes[:, i : i + 1] = rounded
                    error = (column - scales * (rounded - zeros)) / factor[i, i]
                    remaining[:, i:last] -= error * factor[i, i:last]
                    errors[:, i - first] = error.squeeze(1)
                remaining[:, last:] -= errors @ factor[first:last, last:]
        scales, zeros = (torch.stack([pair[i] for pair in ranges], 1) for i in (0, 1))
        return self.packed(self.blocked(codes), scales, zeros)


def _factor(x: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of (xᵀx + damping mean)⁻¹, float32 (columns, columns); mean: of xᵀx's diagonal."""
    import torch

    H = x.double().t() @ x.double()
    mean = H.diagonal().mean().clamp(min=SMALLEST_MEAN)
    H.diagonal().add_(damping * mean)
    linalg = cast("Any", torch.linalg)  # torch leaves it untyped
    inverse = torch.cholesky_inverse(linalg.cholesky(H))
    return linalg.cholesky(inverse, upper=True).float()
