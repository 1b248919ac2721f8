"""Quantized operations of ONNX: custom operations in torch, each with the function that writes it in ONNX."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import onnx_ir as ir
import onnxscript
import torch
from onnxscript import values
from onnxscript.onnx_types import TensorType

op: Any = onnxscript.opset18
FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]


@cache
def _runtime(name: str, inputs: tuple[str, ...], attributes: tuple[str, ...], optional: int = 0) -> Any:
    """An operation of ONNX Runtime's own domain, with as much of its schema as the exporter needs.

    Args:
        name: the operation.
        inputs: the names of its inputs.
        attributes: the names of its integer attributes.
        optional: how many of the last inputs may be left out.
    """
    from onnx.defs import OpSchema

    parameter, option = OpSchema.FormalParameter, OpSchema.FormalParameterOption
    kinds = {"x": "T", "codes": "C", "ids": "I"}
    formal = [
        parameter(
            word,
            kinds.get(word, "Z" if word == "zeros" else "T"),
            param_option=option.Optional if index >= len(inputs) - optional else option.Single,
        )
        for index, word in enumerate(inputs)
    ]
    used = {f.type_str for f in formal}
    constraints = [
        c
        for c in (
            ("T", FLOATS, ""),
            ("C", ["tensor(uint8)"], ""),
            ("Z", ["tensor(uint8)"], ""),
            ("I", ["tensor(int64)"], ""),
        )
        if c[0] in used
    ]
    schema = OpSchema(
        name,
        "com.microsoft",
        1,
        inputs=formal,
        outputs=[parameter("y", "T")],
        type_constraints=constraints,
        attributes=[OpSchema.Attribute(a, OpSchema.AttrType.INT, "") for a in attributes],
    )
    return values.Op(values.Opset("com.microsoft", 1), name, schema)


def matmul_nbits(
    x: TensorType,
    codes: TensorType,
    scales: TensorType,
    zeros: TensorType | None = None,
    bias: TensorType | None = None,
    rows: int = 0,
    columns: int = 0,
    bits: int = 4,
    block: int = 32,
    accuracy: int = 0,
) -> TensorType:
    """`x Wᵀ + bias` by ONNX Runtime's MatMulNBits: W (rows, columns) of codes of 2, 4 or 8 bits, in blocks."""
    operation = _runtime(
        "MatMulNBits",
        ("x", "codes", "scales", "zeros", "groups", "bias"),
        ("K", "N", "bits", "block_size", "accuracy_level"),
        3,
    )
    sizes = {"K": columns, "N": rows, "bits": bits, "block_size": block, "accuracy_level": accuracy}
    return operation(x, codes, op.CastLike(scales, x), zeros, None, bias, **sizes)


def matmul_bnb4(
    x: TensorType,
    codes: TensorType,
    absmax: TensorType,
    rows: int = 0,
    columns: int = 0,
    block: int = 64,
    kind: int = 1,
) -> TensorType:
    """`x Wᵀ` by ONNX Runtime's MatMulBnb4: W (rows, columns) of a table of 16 values, `kind` 0 for fp4, 1 for nf4."""
    operation = _runtime("MatMulBnb4", ("x", "codes", "absmax"), ("K", "N", "block_size", "quant_type"))
    return operation(x, codes, op.CastLike(absmax, x), K=columns, N=rows, block_size=block, quant_type=kind)


def gather_blocks(
    ids: TensorType,
    codes: TensorType,
    scales: TensorType,
    zeros: TensorType | None = None,
    bits: int = 4,
    block: int = 32,
) -> TensorType:
    """Rows of a quantized matrix by ONNX Runtime's GatherBlockQuantized."""
    operation = _runtime(
        "GatherBlockQuantized",
        ("codes", "ids", "scales", "zeros"),
        ("bits", "block_size", "quantize_axis", "gather_axis"),
        1,
    )
    return operation(codes, ids, scales, zeros, bits=bits, block_size=block, quantize_axis=1, gather_axis=0)


def matmul_dequantized(
    x: TensorType,
    codes: TensorType,
    scales: TensorType,
    zeros: TensorType | None = None,
    rows: int = 0,
    block: int = 0,
) -> TensorType:
    """`x W` by DequantizeLinear and MatMul: W (in, out), blocks along the first axis or a scale for each column."""
    options = {"axis": 0, "block_size": block} if block else {"axis": 1}
    opset: Any = onnxscript.opset21
    W = opset.DequantizeLinear(codes, scales, zeros, **options)
    return op.MatMul(x, op.CastLike(W, x))


def matmul_integer(x: TensorType, codes: TensorType, scales: TensorType) -> TensorType:
    """`x W` by DynamicQuantizeLinear, MatMulInteger and a scale, which ONNX Runtime fuses to one operation."""
    wide = op.Cast(x, to=ir.DataType.FLOAT)
    rounded, step, zero = op.DynamicQuantizeLinear(wide)
    product = op.Cast(op.MatMulInteger(rounded, codes, zero), to=ir.DataType.FLOAT)
    return op.CastLike(op.Mul(product, op.Mul(step, scales)), x)


def shifted(x: TensorType, by: int) -> TensorType:
    """`x >> by` of unsigned bytes; the exporter's own form makes them signed."""
    return op.BitShift(x, op.CastLike(op.Constant(value_int=by), x), direction="RIGHT")


TRANSLATIONS: Mapping[str, Callable[..., Any]] = {
    "aten::__rshift__.Scalar": shifted,
    **{
        f"adaptc_onnx::{function.__name__}": function
        for function in (matmul_nbits, matmul_bnb4, matmul_dequantized, matmul_integer, gather_blocks)
    },
}
"""The name of an operation -> the function that writes it in ONNX."""


def integer_type(bits: int) -> ir.DataType:
    """ONNX's unsigned integer of so many bits."""
    return getattr(ir.DataType, f"UINT{bits}")


def integer_tensor(codes: torch.Tensor, bits: int, name: str) -> ir.TensorProtocol:
    """Codes, one in each byte, as a tensor of so many bits, which a file holds packed."""
    import ml_dtypes

    array = codes.numpy()
    return ir.tensor(array.astype(getattr(ml_dtypes, f"uint{bits}")) if bits < 8 else array, name=name)


def opset_needed(bits: int) -> int:
    """The first opset whose DequantizeLinear takes integers of so many bits."""
    return 25 if bits == 2 else 21


def ir_version_needed(bits: int) -> int:
    """The first version of ONNX's file format that has integers of so many bits."""
    return 13 if bits == 2 else 10


library: Any = torch.library.Library("adaptc_onnx", "DEF")
untyped: Any = torch.library
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
"""The custom operations, by name."""


def _rows_by(x: torch.Tensor, rows: int) -> torch.Tensor:
    """A fake result of `x Wᵀ` where W has so many rows."""
    return x.new_empty((*x.shape[:-1], rows))


@untyped.register_fake("adaptc_onnx::matmul_nbits")
def _(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    rows: int,
    *sizes: int,
) -> torch.Tensor:
    return _rows_by(x, rows)


@untyped.register_fake("adaptc_onnx::matmul_bnb4")
def _(x: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor, rows: int, *sizes: int) -> torch.Tensor:
    return _rows_by(x, rows)


@untyped.register_fake("adaptc_onnx::matmul_dequantized")
def _(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    rows: int,
    block: int,
) -> torch.Tensor:
    return _rows_by(x, rows)


@untyped.register_fake("adaptc_onnx::matmul_integer")
def _(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return _rows_by(x, codes.shape[1])


@untyped.register_fake("adaptc_onnx::gather_blocks")
def _(
    ids: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bits: int,
    block: int,
) -> torch.Tensor:
    return scales.new_empty((*ids.shape, codes.shape[1] * 8 // bits))
