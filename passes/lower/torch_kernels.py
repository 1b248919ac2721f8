"""Torch's kernels: products with packed weights, where there is one that is faster than making the weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from adaptc.errors import Refusal
from adaptc.graph import Graph
from adaptc.kernels import KERNELS, Kernel, Product
from adaptc.pipeline import Pass, graph_pass
from adaptc.quantize import forget_bits
from adaptc.quantized_operations import LINEAR


@graph_pass("torch-kernels")
@dataclass(frozen=True)
class TorchKernels(Pass):
    """quantized_linear(x, q) by a kernel that reads the bits themselves, for inference: these have no gradient.

    On a CPU, for up to 4 rows of x in bfloat16: _weight_int8pack_mm of int8 with one scale a row, and
    _weight_int4pack_mm_for_cpu of int4 in blocks of 32 to 256; in other dtypes, and for more rows, torch's own are
    slower than making the weight. On a GPU: _weight_int4pack_mm of the same int4, for up to 64 rows, and bitsandbytes'
    gemm_4bit of its own formats, for any number. Elsewhere none.
    """

    tokens: int = 1
    device: str = "cpu"

    def requires(self, graph: Graph) -> list[Refusal]:
        """Torch reaches the device."""
        try:
            torch.empty(0, device=torch.device(self.device))
        except (RuntimeError, AssertionError, TypeError, ImportError) as error:
            why = str(error).splitlines()[0][:100]
            reason = f"device: torch does not reach {self.device!r} here: {why}\n  expected one such as 'cpu' or 'cuda'"
            return [Refusal(reason)]
        return []

    def call(self, graph: Graph) -> bool:
        """Rewrite the products that such a kernel computes."""
        kernels = [k for k in KERNELS.get(torch.device(self.device).type, ()) if self.tokens <= k.most]
        changed = False
        for node in [n for n in graph.nodes if n.target is LINEAR]:
            product = Product(graph, node, self.device)
            kernel: Kernel | None = next((k for k in kernels if k.takes(product)), None)
            if kernel is None:
                continue
            with graph.module.graph.inserting_before(node):
                result = kernel.call(product)
            node.replace_all_uses_with(result)
            graph.module.graph.erase_node(node)
            changed = True
        graph.module.graph.eliminate_dead_code()
        read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
        forget_bits(graph, [name for name, q in graph.quantized.items() if q.tensors["codes"] not in read])
        return changed
