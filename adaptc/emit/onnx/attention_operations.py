"""Attention in ONNX: a custom operation in torch for each form, with the function that writes it in ONNX."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from onnxscript import values

OPSET = 24
"""The opset that the operations are of, where none is asked for."""
Attention: Any = values.Op(values.Opset("", OPSET), "Attention")


def attention(q: Any, k: Any, v: Any, mask: Any = None, scale: float = 1.0, causal: bool = False) -> Any:
    """ONNX's Attention of a query `(batch, heads, tokens, size)` with all keys and values."""
    return Attention(q, k, v, mask, scale=scale, is_causal=int(causal))[0]


def cached_attention(
    q: Any, k: Any, v: Any, mask: Any, past_key: Any, past_value: Any, scale: float = 1.0
) -> Any:
    """ONNX's Attention, which joins new keys and values with past ones, and gives the joined ones too."""
    return tuple(Attention(q, k, v, mask, past_key, past_value, scale=scale))[:3]


TRANSLATIONS: Mapping[str, Callable[..., Any]] = {
    f"adaptc_onnx::{function.__name__}": function for function in (attention, cached_attention)
}
"""The name of an operation -> the function that writes it in ONNX."""

library: Any = torch.library.Library("adaptc_onnx", "FRAGMENT")
untyped: Any = torch.library
library.define("attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, bool causal) -> Tensor")
library.define(
    "cached_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor past_key, Tensor past_value, "
    "float scale) -> (Tensor, Tensor, Tensor)"
)


@untyped.register_fake("adaptc_onnx::attention")
def _(q: Any, k: Any, v: Any, *rest: Any) -> torch.Tensor:
    return q.new_empty((*q.shape[:3], v.shape[3]))


@untyped.register_fake("adaptc_onnx::cached_attention")
def _(q: Any, k: Any, v: Any, mask: Any, past_key: Any, past_value: Any, scale: float) -> Any:
    joined = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    return q.new_empty((*q.shape[:3], v.shape[3])), *joined


STANDARD: frozenset[Any] = frozenset(
    [torch.ops.adaptc_onnx.attention.default, torch.ops.adaptc_onnx.cached_attention.default]
)
"""The operations that are ONNX's Attention."""
