"""AWQ: columns that meet large activations are scaled up before they are rounded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, cast

from pydantic import Field

from adaptc.quantization.integer import BlockSize, CalibratedBlocks, Symmetric
from adaptc.quantization.scheme import StoredTensor, Tensors, scheme

if TYPE_CHECKING:
    from torch import Tensor

Steps = Annotated[int, Field(ge=1, description="exponents that are tried, from 0 to 1")]
SMALLEST_MEAN = 1e-8
"""The smallest mean of a column's inputs, so that a column without any divides by no zero."""


@scheme("awq")
@dataclass(frozen=True)
class Awq(CalibratedBlocks):
    """W = scales (codes - zeros) diag(s)⁻¹        s = mean |x|^a over tokens, for each column of W

    Lin et al. 2024, section 3.2 and equation 5: columns that meet large activations are rounded more finely. Of
    `steps` exponents a from 0 to 1 the one with the least ‖x W_floatᵀ - x Wᵀ‖ is taken. The inputs of the product are
    multiplied by 1 / s, one multiplication a number.
    """

    block_size: BlockSize = 128
    symmetric: Symmetric = False
    steps: Steps = 20

    def stored(self, rows: int, columns: int) -> dict[str, StoredTensor]:
        """What integers in blocks store, and `channels`: 1 / s, which inputs are multiplied by."""
        return super().stored(rows, columns) | {"channels": StoredTensor((columns,), "float32")}

    def quantize(self, W: Tensor, inputs: Tensor | None = None) -> dict[str, Tensor]:
        """Round with each exponent, and take the one whose outputs change least on the inputs."""
        assert inputs is not None
        rows, columns = W.shape
        size, outputs = inputs.abs().mean(0).clamp(min=SMALLEST_MEAN), inputs @ W.t()
        best: dict[str, Tensor] = {}
        least = float("inf")
        for step in range(self.steps + 1):
            s = size ** (step / self.steps)
            s = s / (s.max() * s.min()).sqrt()
            tensors = {**super().quantize(W * s), "channels": 1 / s}
            error = float(cast("Any", inputs @ self.dequantize(rows, columns, tensors).t() - outputs).norm())
            if error < least:
                best, least = tensors, error
        return best

    def transformed_inputs(self, x: Tensor, tensors: Tensors) -> Tensor:
        """`x / s`."""
        return x * tensors["channels"].to(x.dtype)

    def restored(self, S: Tensor, tensors: Tensors) -> Tensor:
        """The columns of S divided by s."""
        return S * tensors["channels"]
