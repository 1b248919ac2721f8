"""Operations that stand for one of ONNX each. They have shapes, and no kernels: the graph they come from runs."""

from __future__ import annotations

from typing import Any

import torch

library = torch.library.Library("adaptc_onnx", "DEF")
library.define(
    "matmul_nbits(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor? bias, "
    "int rows, int columns, int bits, int block, int accuracy) -> Tensor"
)
library.define(
    "matmul_bnb4(Tensor x, Tensor codes, Tensor absmax, int rows, int columns, int block, int kind) -> Tensor"
)
library.define(
    "matmul_dequantized(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, int rows, int block) -> Tensor"
)
library.define("matmul_integer(Tensor x, Tensor codes, Tensor scales) -> Tensor")
library.define(
    "gather_blocks(Tensor ids, Tensor codes, Tensor scales, Tensor? zeros, int bits, int block) -> Tensor"
)
onnx = torch.ops.adaptc_onnx
"""All of them, by name."""


def _rows_by(x: torch.Tensor, rows: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], rows))


@torch.library.register_fake("adaptc_onnx::matmul_nbits")
def _(x: Any, codes: Any, scales: Any, zeros: Any, bias: Any, rows: int, *sizes: int) -> torch.Tensor:
    return _rows_by(x, rows)


@torch.library.register_fake("adaptc_onnx::matmul_bnb4")
def _(x: Any, codes: Any, absmax: Any, rows: int, *sizes: int) -> torch.Tensor:
    return _rows_by(x, rows)


@torch.library.register_fake("adaptc_onnx::matmul_dequantized")
def _(x: Any, codes: Any, scales: Any, zeros: Any, rows: int, block: int) -> torch.Tensor:
    return _rows_by(x, rows)


@torch.library.register_fake("adaptc_onnx::matmul_integer")
def _(x: Any, codes: Any, scales: Any) -> torch.Tensor:
    return _rows_by(x, codes.shape[1])


@torch.library.register_fake("adaptc_onnx::gather_blocks")
def _(ids: Any, codes: Any, scales: Any, zeros: Any, bits: int, block: int) -> torch.Tensor:
    return scales.new_empty((*ids.shape, codes.shape[1] * 8 // bits))
