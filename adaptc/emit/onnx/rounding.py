"""The rounding of activations by ONNX Runtime's integer products, computed in torch to prove such a program."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch

from adaptc.emit.onnx.lower_quantized import runtime_block
from adaptc.ir.graph import Graph
from adaptc.quantization.integer import IntegerBlocks
from adaptc.quantization.operators import LINEAR
from adaptc.quantization.scheme import scheme_of
from adaptc.rewriter.expression import splice, trace_expression
from adaptc.rewriter.pipeline import Pass

EXACT = {(2, 16), (2, 256)}
"""(bits, block) for which MatMulNBits rounds no activations, as tests/parity/test_matmul_nbits.py measures."""


def rounds_activations(graph: Graph) -> bool:
    """Whether ONNX Runtime rounds the activations of some matrix product of this graph."""
    return any(_rounding(node) is not None for node in graph.nodes)


@dataclass(frozen=True)
class RoundActivations(Pass):
    """quantized_linear(x, q) becomes quantized_linear(rounded(x), q): 8 bits, in blocks or one range for all of x."""

    name: ClassVar[str] = "round-activations"
    takes: ClassVar[frozenset[str]] = frozenset({"evaluated"})
    changes_results: ClassVar[bool] = True

    def call(self, graph: Graph) -> bool:
        """Round the activations of every matrix product for which ONNX Runtime does."""
        products = [(node, block) for node in graph.nodes if (block := _rounding(node)) is not None]
        for node, block in products:
            x: Any = node.args[0]
            with graph.fake_mode:
                traced = trace_expression(partial(rounded, block=block), [x.meta["val"]], {})
            node.update_arg(0, splice(graph, traced, [x], node, {}))
        return bool(products)


def rounded(x: torch.Tensor, block: int) -> torch.Tensor:
    """x rounded to 8 bits: symmetrically in blocks of the last axis, or in one range if `block` is 0."""
    if not block:
        low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
        step = ((high - low) / 255).clamp(min=1e-30)
        zero = (-low / step).round()
        return (((x / step).round() + zero).clamp(0, 255) - zero) * step
    columns = x.shape[-1]
    if columns % block:  # `pad` would fix the sizes of the other axes
        x = torch.cat([x, torch.zeros_like(x[..., : -columns % block])], -1)
    blocks = x.reshape(*x.shape[:-1], -(-columns // block), block)
    step = (blocks.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
    return ((blocks / step).round() * step).reshape(*x.shape[:-1], -1)[..., :columns]


def _rounding(node: Any) -> int | None:
    """The block in which ONNX Runtime rounds a node's activations; 0 for one range for all; None if it does not."""
    if node.target is not LINEAR:
        return None
    scheme, columns = scheme_of(node.args[3]), node.args[5]
    if not isinstance(scheme, IntegerBlocks):
        return None
    if scheme.integer_products:
        return 0
    block = runtime_block(scheme, columns)
    return None if (scheme.bits, block) in EXACT else block
