"""What the operations of `quantized_products` are in ONNX."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import onnx_ir as ir
import onnxscript
import torch
from onnxscript import values

op: Any = onnxscript.opset18
FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]


@cache
def _runtime(name: str, inputs: tuple[str, ...], attributes: tuple[str, ...], optional: int = 0) -> Any:
    """An operation of ONNX Runtime's own domain, of whose schema only what is needed is told."""
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
    x: Any,
    codes: Any,
    scales: Any,
    zeros: Any = None,
    bias: Any = None,
    rows: int = 0,
    columns: int = 0,
    bits: int = 4,
    block: int = 32,
    accuracy: int = 0,
) -> Any:
    """`com.microsoft` MatMulNBits."""
    made = _runtime(
        "MatMulNBits",
        ("x", "codes", "scales", "zeros", "groups", "bias"),
        ("K", "N", "bits", "block_size", "accuracy_level"),
        3,
    )
    sizes = {"K": columns, "N": rows, "bits": bits, "block_size": block, "accuracy_level": accuracy}
    return made(x, codes, op.CastLike(scales, x), zeros, None, bias, **sizes)


def matmul_bnb4(
    x: Any, codes: Any, absmax: Any, rows: int = 0, columns: int = 0, block: int = 64, kind: int = 1
) -> Any:
    """`com.microsoft` MatMulBnb4."""
    made = _runtime("MatMulBnb4", ("x", "codes", "absmax"), ("K", "N", "block_size", "quant_type"))
    return made(x, codes, op.CastLike(absmax, x), K=columns, N=rows, block_size=block, quant_type=kind)


def gather_blocks(
    ids: Any, codes: Any, scales: Any, zeros: Any = None, bits: int = 4, block: int = 32
) -> Any:
    """`com.microsoft` GatherBlockQuantized."""
    made = _runtime(
        "GatherBlockQuantized",
        ("codes", "ids", "scales", "zeros"),
        ("bits", "block_size", "quantize_axis", "gather_axis"),
        1,
    )
    return made(codes, ids, scales, zeros, bits=bits, block_size=block, quantize_axis=1, gather_axis=0)


def matmul_dequantized(
    x: Any, codes: Any, scales: Any, zeros: Any = None, rows: int = 0, block: int = 0
) -> Any:
    """DequantizeLinear in blocks of the first axis, or for each column of `(in, out)`, and MatMul."""
    options = {"axis": 0, "block_size": block} if block else {"axis": 1}
    W = onnxscript.opset21.DequantizeLinear(codes, scales, zeros, **options)
    return op.MatMul(x, op.CastLike(W, x))


def matmul_integer(x: Any, codes: Any, scales: Any) -> Any:
    """DynamicQuantizeLinear, MatMulInteger and a scale, which ONNX Runtime fuses to one."""
    wide = op.Cast(x, to=ir.DataType.FLOAT)
    rounded, step, zero = op.DynamicQuantizeLinear(wide)
    product = op.Cast(op.MatMulInteger(rounded, codes, zero), to=ir.DataType.FLOAT)
    return op.CastLike(op.Mul(product, op.Mul(step, scales)), x)


def shifted(x: Any, by: int) -> Any:
    """`x >> by` of bytes, which the exporter's own would make signed."""
    return op.BitShift(x, op.CastLike(op.Constant(value_int=by), x), direction="RIGHT")


TRANSLATIONS: Mapping[str, Callable[..., Any]] = {
    "aten::__rshift__.Scalar": shifted,
    **{
        f"adaptc_onnx::{function.__name__}": function
        for function in (matmul_nbits, matmul_bnb4, matmul_dequantized, matmul_integer, gather_blocks)
    },
}
"""An operation by its name -> what computes it in ONNX."""


def integer_type(bits: int) -> Any:
    """ONNX's unsigned integer of so many bits."""
    return getattr(ir.DataType, f"UINT{bits}")


def integer_tensor(codes: torch.Tensor, bits: int, name: str) -> Any:
    """Codes, one a byte, as a tensor of so many bits, which a file holds packed."""
    import ml_dtypes

    array = codes.numpy()
    return ir.tensor(array.astype(getattr(ml_dtypes, f"uint{bits}")) if bits < 8 else array, name=name)


def opset_needed(bits: int) -> int:
    """The opset whose DequantizeLinear takes integers of so many bits."""
    return 25 if bits == 2 else 21


def ir_version_needed(bits: int) -> int:
    """The version of the format that knows integers of so many bits."""
    return 13 if bits == 2 else 10


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
