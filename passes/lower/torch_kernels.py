"""Torch's kernels: products with packed weights, where torch has one that is faster than making the weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from adaptc.graph import Graph
from adaptc.integer_blocks import IntegerBlocks, unpack
from adaptc.pipeline import Pass, graph_pass
from adaptc.quantized_operations import LINEAR, named
from adaptc.scheme import scheme_of
from adaptc.weights import Computed, Weight

aten = torch.ops.aten
BLOCKS = (32, 64, 128, 256)
"""Blocks that torch's product with 4-bit weights takes."""
FEW = 4
"""Rows of x up to which the kernels are faster on a CPU; beyond, the weight is better made once."""


@graph_pass("torch-kernels")
@dataclass(frozen=True)
class TorchKernels(Pass):
    """quantized_linear(x, q) = _weight_int4pack_mm_for_cpu(x, packed), or _weight_int8pack_mm, in bfloat16.

    For inference: these have no gradient. They are taken for `tokens` rows of x at a time of at most 4, as a model
    generates; in other dtypes, and for more rows, torch's own are slower than making the weight.
    """

    tokens: int = 1

    def call(self, graph: Graph) -> bool:
        """Rewrite the products that such a kernel computes."""
        changed = False
        for node in list(graph.nodes):
            if node.target is not LINEAR or self.tokens > FEW:
                continue
            with graph.module.graph.inserting_before(node):
                result = _product(graph, node)
            if result is not None:
                node.replace_all_uses_with(result)
                graph.module.graph.erase_node(node)
                changed = True
        return changed


def _product(graph: Graph, node: fx.Node) -> fx.Node | None:
    args: Any = node.args
    x, tensors, bias, text, rows, columns = args
    scheme = scheme_of(text)
    if x.meta["val"].dtype != torch.bfloat16 or not isinstance(scheme, IntegerBlocks) or scheme.calibrated:
        return None
    held, prefix = named(tensors, text, rows, columns), str(tensors[0].target).removesuffix("codes")
    weights = {key: graph.weights[str(n.target)] for key, n in held.items()}
    flat = graph.call(aten.reshape.default, x, [-1, columns], like=node)
    if scheme.bits == 8 and scheme.block_size is None and scheme.symmetric:
        codes = _attached(graph, f"{prefix}int8", (rows, columns), torch.int8, lambda: _signed(weights))
        scales = _attached(
            graph, f"{prefix}row_scales", (rows,), torch.bfloat16, lambda: weights["scales"].load()[:, 0]
        )
        y = graph.call(aten._weight_int8pack_mm.default, flat, codes, scales, like=node)
    elif (
        scheme.bits == 4
        and scheme.block_size in BLOCKS
        and columns % scheme.block_size == 0
        and rows % 16 == 0
    ):
        size, n = (rows, columns // 2), columns // scheme.block_size
        codes = _attached(graph, f"{prefix}packed", size, torch.uint8, lambda: _packed(weights))
        ranges = _attached(
            graph, f"{prefix}ranges", (n, rows, 2), torch.bfloat16, lambda: _ranges(scheme, weights)
        )
        kernel = aten._weight_int4pack_mm_for_cpu.default
        y = graph.call(kernel, flat, codes, scheme.block_size, ranges, like=node)
    else:
        return None
    shape = [graph.call(aten.sym_size.int, x, axis, like=node) for axis in range(x.meta["val"].dim() - 1)]
    y = graph.call(aten.reshape.default, y, [*shape, rows], like=node)
    return y if bias is None else graph.call(aten.add.Tensor, y, bias, like=node)


def _attached(graph: Graph, name: str, shape: tuple[int, ...], dtype: torch.dtype, make: Any) -> fx.Node:
    if name not in graph.weights:
        graph.attach(name, Computed(shape, dtype, make), trained=False)
    return graph.parameter_node(name)


def _signed(weights: dict[str, Weight]) -> torch.Tensor:
    """Codes around zero."""
    return (weights["codes"].load()[:, 0].short() - 128).to(torch.int8)


def _packed(weights: dict[str, Weight]) -> torch.Tensor:
    """Codes as torch's kernel wants them on this machine."""
    codes = unpack(weights["codes"].load(), 4).flatten(1).int()
    return aten._convert_weight_to_int4pack_for_cpu(codes, 8)


def _ranges(scheme: IntegerBlocks, weights: dict[str, Weight]) -> torch.Tensor:
    """A scale and what stands for the middle code, of every block: (blocks, rows, 2)."""
    scales = weights["scales"].load()
    zeros: Any = 8.0
    if not scheme.symmetric:
        zeros = unpack(weights["zeros"].load(), 4)[:, : scales.shape[1]].float()
    return torch.stack([scales, scales * (8.0 - zeros)], -1).transpose(0, 1).contiguous()
