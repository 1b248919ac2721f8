"""ONNX forms of operations for which torch's exporter has none, or one that computes something else."""

# pyright: reportPrivateUsage=false, reportMissingTypeStubs=false
# `torch._ops` is the only name of an operation's type, and onnxscript's functions have no types.

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxscript
import torch
from onnxscript.function_libs.torch_lib.ops import fft
from onnxscript.function_libs.torch_lib.ops.nn import aten_scaled_dot_product_attention

from adaptc.emit.onnx import attention_operations, norm_operations, quantized_operations
from adaptc.emit.onnx.recurrent import rnn

op: Any = onnxscript.opset18


def translations(targets: Iterable[Any]) -> dict[torch._ops.OpOverload[..., Any], Callable[..., Any]]:
    """Operation -> the function that computes it in ONNX, of those operations that have a form here."""
    overloads: set[torch._ops.OpOverload[..., Any]] = {
        target for target in targets if isinstance(target, torch._ops.OpOverload)
    }
    return {target: FORMS[target.name()] for target in overloads if target.name() in FORMS}


def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """The exporter's attention, but a query that sees no key gives zeros, as in torch, not the mean of all values.

    Such queries are padding on the left, or beyond a sliding window.
    """
    result = aten_scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
    )
    if attn_mask is None:
        return result
    last = op.Constant(value_ints=[-1])
    if attn_mask.dtype == ir.DataType.BOOL:
        sees = op.Cast(op.ReduceMax(op.Cast(attn_mask, to=ir.DataType.INT32), last), to=ir.DataType.BOOL)
    else:
        sees = op.Not(op.IsInf(op.ReduceMax(attn_mask, last), detect_positive=0))
    return op.Where(sees, result, op.CastLike(op.Constant(value_float=0.0), query))


def grouped_product(rows: Any, weight: Any, ends: Any) -> Any:
    """`rows[start:end] @ weight[e]` for each expert e, whose rows end at `ends[e]`.

    rows (s, in), weight (experts, in, out), ends (experts,).
    """
    axis, start = op.Constant(value_ints=[0]), op.Constant(value_ints=[0])
    parts: list[Any] = []
    ends = op.Cast(ends, to=ir.DataType.INT64)
    for expert in range(weight.shape[0]):
        end = op.Gather(ends, op.Constant(value_ints=[expert]))
        matrix = op.Gather(weight, op.Constant(value_int=expert))
        parts.append(op.MatMul(op.Slice(rows, start, end, axis), matrix))
        start = end
    return op.Concat(*parts, axis=0)


def solved(A: Any, B: Any, left: bool = True, check_errors: bool = False) -> tuple[Any, ...]:
    """`A⁻¹ B`, or `B A⁻¹` if not `left`, by Newton's iteration X ← X (2 I - A X), which ONNX has the operations for.

    A (..., n, n), B (..., n, k), or (..., n) for one column. From X = Aᵀ / (‖A‖₁ ‖A‖∞) it converges quadratically for
    every A that has an inverse (Ben-Israel and Cohen 1966). `NEWTON` steps are enough for condition numbers up to about
    a thousand.

    Returns:
        The result three times, as the factors of A, which torch gives too, have no form here; and that it was found.
    """
    inverse, info = inverted(A)
    if len(B.shape) == len(A.shape):
        result = op.MatMul(inverse, B) if left else op.MatMul(B, inverse)
    else:
        last = op.Constant(value_ints=[-1])
        result = op.Squeeze(op.MatMul(inverse, op.Unsqueeze(B, last)), last)
    return result, result, result, info


def inverted(A: Any, check_errors: bool = False) -> tuple[Any, ...]:
    """`A⁻¹` as `solved` computes it, and a zero for each matrix: that it was found."""
    rank, axes = len(A.shape), [op.Constant(value_ints=[axis]) for axis in (-2, -1)]
    sums = [
        op.ReduceMax(op.ReduceSum(op.Abs(A), axis, keepdims=1), other) for axis, other in (axes, axes[::-1])
    ]
    start = op.Transpose(A, perm=[*range(rank - 2), rank - 1, rank - 2])
    inverse = op.Div(start, op.Mul(*sums))
    twice = op.CastLike(op.Constant(value=ir.tensor(2 * np.eye(A.shape[-1], dtype=np.float32))), A)
    for _ in range(NEWTON):
        inverse = op.MatMul(inverse, op.Sub(twice, op.MatMul(A, inverse)))
    zero = ir.tensor(np.zeros(1, dtype=np.int32))
    return inverse, op.ConstantOfShape(op.Shape(A, start=0, end=rank - 2), value=zero)


def extreme(reduce: Callable[..., Any]) -> Callable[..., Any]:
    """`amax` or `amin`, whose axes may be left out: then they are all."""

    def reduced(x: Any, dim: Sequence[int] = (), keepdim: bool = False) -> Any:
        return reduce(x, op.Constant(value_ints=list(dim)) if dim else None, keepdims=int(keepdim))

    return reduced


def in_double(transform: Callable[..., Any]) -> Callable[..., Any]:
    """A Fourier transform in float64: in float32 ONNX Runtime's is off by 1e-4 where a size is no power of two."""

    def transformed(x: Any, *options: Any) -> Any:
        return op.CastLike(transform(op.Cast(x, to=ir.DataType.DOUBLE), *options), x)

    vars(transformed)["__signature__"] = inspect.signature(transform)  # the exporter reads it
    return transformed


NEWTON = 24
"""Steps of Newton's iteration in `solved`."""
COMPLEX = frozenset({"aten::_fft_c2c", "aten::_fft_c2r"})
"""Operations on complex numbers, which are pairs on a last axis in ONNX."""
TRANSLATIONS: Mapping[str, Callable[..., Any]] = {
    "aten::scaled_dot_product_attention": attention,
    "transformers::grouped_mm_fallback": grouped_product,
    "aten::_grouped_mm": grouped_product,
    "aten::_linalg_solve_ex": solved,
    "aten::linalg_inv_ex": inverted,
    "aten::_fft_r2c": in_double(fft.aten__fft_r2c),
    "aten::_fft_c2c": in_double(fft.aten__fft_c2c),
    "aten::_fft_c2r": in_double(fft.aten__fft_c2r),
    "aten::amax": extreme(op.ReduceMax),
    "aten::amin": extreme(op.ReduceMin),
    "aten::sym_numel": op.Size,
    "aten::rnn_tanh.input": rnn("Tanh"),
    "aten::rnn_relu.input": rnn("Relu"),
}
"""An operation by torch's name -> what computes it in ONNX."""
FORMS: Mapping[str, Callable[..., Any]] = {
    **TRANSLATIONS,
    **quantized_operations.TRANSLATIONS,
    **attention_operations.TRANSLATIONS,
    **norm_operations.TRANSLATIONS,
}
"""The same, with the operations that adaptc makes of quantized products and attentions."""
