"""Attention in ONNX: a custom operation in torch for each form, with the function that writes it in ONNX."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from onnxscript import values

OPSET = 24
"""The opset that the operations are of, where none is asked for."""
Attention: Any = values.Op(values.Opset("", OPSET), "Attention")


def attention(
    q: Any,
    k: Any,
    v: Any,
    mask: Any = None,
    scale: float = 1.0,
    causal: bool = False,
    softcap: float = 0.0,
) -> Any:
    """ONNX's Attention of a query `(batch, heads, tokens, size)` with all keys and values."""
    return Attention(q, k, v, mask, scale=scale, is_causal=int(causal), softcap=softcap)[0]


def cached_attention(
    q: Any,
    k: Any,
    v: Any,
    mask: Any,
    past_key: Any,
    past_value: Any,
    scale: float = 1.0,
    softcap: float = 0.0,
) -> Any:
    """ONNX's Attention, which joins new keys and values with past ones, and gives the joined ones too."""
    return tuple(Attention(q, k, v, mask, past_key, past_value, scale=scale, softcap=softcap))[:3]


@cache
def _grouped() -> Any:
    """ONNX Runtime's GroupQueryAttention, with as much of its schema as the exporter needs."""
    from onnx.defs import OpSchema

    parameter, option = OpSchema.FormalParameter, OpSchema.FormalParameterOption
    kinds = {"lengths": "M", "total": "M", "positions": "I"}
    names = ["q", "k", "v", "past_key", "past_value", "lengths", "total", "cos", "sin", "positions", "bias"]
    required = ("q", "lengths", "total")
    inputs = [
        parameter(n, kinds.get(n, "T"), param_option=option.Single if n in required else option.Optional)
        for n in names
    ]
    whole = ("num_heads", "kv_num_heads", "do_rotary", "local_window_size")
    schema = OpSchema(
        "GroupQueryAttention",
        "com.microsoft",
        1,
        inputs=inputs,
        outputs=[parameter(name, "T") for name in ("y", "present_key", "present_value")],
        type_constraints=[
            ("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], ""),
            ("M", ["tensor(int32)"], ""),
            ("I", ["tensor(int64)"], ""),
        ],
        attributes=[
            *(OpSchema.Attribute(name, OpSchema.AttrType.INT, "") for name in whole),
            *(OpSchema.Attribute(name, OpSchema.AttrType.FLOAT, "") for name in ("scale", "softcap")),
        ],
    )
    return values.Op(values.Opset("com.microsoft", 1), "GroupQueryAttention", schema)


def grouped_attention(
    q: Any,
    k: Any,
    v: Any,
    past_key: Any,
    past_value: Any,
    lengths: Any,
    total: Any,
    cos: Any = None,
    sin: Any = None,
    bias: Any = None,
    heads: int = 1,
    kv_heads: int = 1,
    scale: float = 1.0,
    window: int = -1,
    softcap: float = 0.0,
) -> Any:
    """ONNX Runtime's GroupQueryAttention of new tokens `(batch, tokens, heads * size)`; it rotates them by a table."""
    options = {"num_heads": heads, "kv_num_heads": kv_heads, "scale": scale, "local_window_size": window}
    options["softcap"] = softcap
    parts = (q, k, v, past_key, past_value, lengths, total, cos, sin, None, bias)
    return _grouped()(*parts, do_rotary=int(cos is not None), **options)


TRANSLATIONS: Mapping[str, Callable[..., Any]] = {
    f"adaptc_onnx::{function.__name__}": function
    for function in (attention, cached_attention, grouped_attention)
}
"""The name of an operation -> the function that writes it in ONNX."""

library: Any = torch.library.Library("adaptc_onnx", "FRAGMENT")
untyped: Any = torch.library
library.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, bool causal, "
    "float softcap=0.0) -> Tensor"
)
library.define(
    "cached_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor past_key, Tensor past_value, "
    "float scale, float softcap=0.0) -> (Tensor, Tensor, Tensor)"
)
library.define(
    "grouped_attention(Tensor q, Tensor? k, Tensor? v, Tensor past_key, Tensor past_value, Tensor lengths, "
    "Tensor total, Tensor? cos, Tensor? sin, Tensor? bias, int heads, int kv_heads, float scale, int window, "
    "float softcap=0.0) -> (Tensor, Tensor, Tensor)"
)


library.define(
    "scaled_dot_product_attention(Tensor q, Tensor k, Tensor v, Tensor? attn_mask, float dropout_p, bool is_causal, "
    "float? scale, float softcap) -> Tensor"
)  # torch's own, with a cap; one of the others takes its place


@untyped.register_fake("adaptc_onnx::scaled_dot_product_attention")
@untyped.register_fake("adaptc_onnx::attention")
def _(q: Any, k: Any, v: Any, *rest: Any) -> torch.Tensor:
    return q.new_empty((*q.shape[:3], v.shape[3]))


@untyped.register_fake("adaptc_onnx::cached_attention")
def _(q: Any, k: Any, v: Any, mask: Any, past_key: Any, past_value: Any, *rest: Any) -> Any:
    joined = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    return q.new_empty((*q.shape[:3], v.shape[3])), *joined


@untyped.register_fake("adaptc_onnx::grouped_attention")
def _(q: Any, k: Any, v: Any, past_key: Any, past_value: Any, *rest: Any) -> Any:
    def joined(past: Any) -> torch.Tensor:
        return past.new_empty((*past.shape[:2], past.shape[2] + q.shape[1], past.shape[3]))

    heads, size = rest[5], past_key.shape[3]
    return q.new_empty((*q.shape[:2], heads * size)), joined(past_key), joined(past_value)


STANDARD: frozenset[Any] = frozenset(
    [torch.ops.adaptc_onnx.attention.default, torch.ops.adaptc_onnx.cached_attention.default]
)
"""The operations that are ONNX's Attention."""
