"""Norms in ONNX Runtime: custom operations in torch, each with the function that writes it in ONNX."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from onnxscript import values


@cache
def _runtime(
    name: str, domain: str, inputs: tuple[str, ...], outputs: int, attributes: tuple[str, ...]
) -> Any:
    """A norm of ONNX Runtime, with as much of its schema as the exporter needs."""
    from onnx.defs import OpSchema

    kinds = {"axis": OpSchema.AttrType.INT, "epsilon": OpSchema.AttrType.FLOAT}
    option = OpSchema.FormalParameterOption
    results = [
        OpSchema.FormalParameter(f"y{number}", "T", param_option=option.Optional if number else option.Single)
        for number in range(outputs)
    ]
    schema = OpSchema(
        name,
        domain,
        1,
        inputs=[OpSchema.FormalParameter(word, "T") for word in inputs],
        outputs=results,
        type_constraints=[("T", ["tensor(float)"], "")],
        attributes=[OpSchema.Attribute(word, kinds[word], "") for word in attributes],
    )
    return values.Op(values.Opset(domain, 1), name, schema)


def rms_norm(x: Any, weight: Any, epsilon: float = 1e-6) -> Any:
    """`x / sqrt(mean(x²) + epsilon) * weight` by SimplifiedLayerNormalization, an operation of ONNX Runtime."""
    operation = _runtime("SimplifiedLayerNormalization", "", ("x", "weight"), 1, ("axis", "epsilon"))
    return operation(x, weight, axis=-1, epsilon=epsilon)


def skip_rms_norm(x: Any, skip: Any, weight: Any, epsilon: float = 1e-6) -> Any:
    """The norm of a sum, and the sum."""
    operation = _runtime(
        "SkipSimplifiedLayerNormalization", "com.microsoft", ("x", "skip", "weight"), 4, ("epsilon",)
    )
    results = operation(x, skip, weight, epsilon=epsilon)
    return results[0], results[3]


TRANSLATIONS: Mapping[str, Callable[..., Any]] = {
    f"adaptc_onnx::{function.__name__}": function for function in (rms_norm, skip_rms_norm)
}
"""The name of an operation -> the function that writes it in ONNX."""

library: Any = torch.library.Library("adaptc_onnx", "FRAGMENT")
untyped: Any = torch.library
library.define("rms_norm(Tensor x, Tensor weight, float epsilon) -> Tensor")
library.define("skip_rms_norm(Tensor x, Tensor skip, Tensor weight, float epsilon) -> (Tensor, Tensor)")


@untyped.register_fake("adaptc_onnx::rms_norm")
def _(x: Any, weight: Any, epsilon: float) -> torch.Tensor:
    return torch.empty_like(x)


@untyped.register_fake("adaptc_onnx::skip_rms_norm")
def _(x: Any, skip: Any, weight: Any, epsilon: float) -> Any:
    return torch.empty_like(x), torch.empty_like(x)
