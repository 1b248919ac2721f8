"""Torch operations on quantized weights: dequantize, and matrix product and lookup that keep no dequantized weight."""

# torch leaves the functions that a custom operation registers untyped:
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptc.quantization.scheme import scheme_of


@torch.library.custom_op("adaptc::dequantize", mutates_args=())
def dequantize(tensors: Sequence[Tensor], scheme: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """The dequantized matrix `(rows, columns)`.

    Args:
        tensors: what the scheme stores, then its constants, in the order that the scheme names them.
        scheme: the text of the scheme, see `Scheme.text`.
        rows: of the matrix.
        columns: of the matrix.
        dtype: of the result.
    """
    # A custom operation may not return an operand, nor a view of one.
    return _dequantized(tensors, scheme, rows, columns, dtype).contiguous()


@dequantize.register_fake
def _(tensors: Sequence[Tensor], scheme: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return tensors[0].new_empty((rows, columns), dtype=dtype)


@torch.library.custom_op("adaptc::quantized_linear", mutates_args=())
def quantized_linear(
    x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None, scheme: str, rows: int, columns: int
) -> Tensor:
    """`linear(x, W, bias)` for a quantized W. The gradient of x dequantizes W again, which is not kept in between."""
    W = _dequantized(tensors, scheme, rows, columns, x.dtype)
    return F.linear(x, W, bias)


@quantized_linear.register_fake
def _(
    x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None, scheme: str, rows: int, columns: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, tensors, bias, *ctx.scheme_and_size = inputs
    ctx.save_for_backward(*tensors)
    ctx.biased = bias is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    tensors = list(ctx.saved_tensors)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = quantized_product(grad, tensors, *ctx.scheme_and_size)
    if ctx.biased and ctx.needs_input_grad[2]:
        grad_bias = grad.flatten(0, -2).sum(0)
    return grad_x, [None] * len(tensors), grad_bias, None, None, None


quantized_linear.register_autograd(_backward, setup_context=_keep)


@torch.library.custom_op("adaptc::quantized_product", mutates_args=())
def quantized_product(
    grad: Tensor, tensors: Sequence[Tensor], scheme: str, rows: int, columns: int
) -> Tensor:
    """`grad @ W` for a quantized W: the gradient of x in `quantized_linear`."""
    return grad @ _dequantized(tensors, scheme, rows, columns, grad.dtype)


@quantized_product.register_fake
def _(grad: Tensor, tensors: Sequence[Tensor], scheme: str, rows: int, columns: int) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], columns))


def _dequantized(tensors: Sequence[Tensor], text: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return scheme_of(text).unpack(rows, columns, tensors_by_name(tensors, text, rows, columns), dtype)


def tensors_by_name(tensors: Sequence[Any], text: str, rows: int, columns: int) -> dict[str, Any]:
    """The operands of a quantized operation by the names of the scheme: what it stores, then its constants.

    Args:
        tensors: the operands, as tensors or as nodes.
        text: the text of the scheme.
        rows: of the matrix.
        columns: of the matrix.
    """
    scheme = scheme_of(text)
    return dict(zip((*scheme.stored(rows, columns), *scheme.constants()), tensors, strict=True))


@torch.library.custom_op("adaptc::quantized_embedding", mutates_args=())
def quantized_embedding(
    ids: Tensor, tensors: Sequence[Tensor], scheme: str, rows: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """`embedding(W, ids)` for a quantized W, of which only these rows are dequantized."""
    looked_up = scheme_of(scheme).lookup(rows, columns, tensors_by_name(tensors, scheme, rows, columns), ids)
    return looked_up.to(dtype).contiguous()


@quantized_embedding.register_fake
def _(
    ids: Tensor, tensors: Sequence[Tensor], scheme: str, rows: int, columns: int, dtype: torch.dtype
) -> Tensor:
    return tensors[0].new_empty((*ids.shape, columns), dtype=dtype)


DEQUANTIZE = torch.ops.adaptc.dequantize.default
LINEAR = torch.ops.adaptc.quantized_linear.default
EMBEDDING = torch.ops.adaptc.quantized_embedding.default
