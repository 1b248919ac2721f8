"""Kernels that multiply by packed weights as they are stored: torch's own, and bitsandbytes'."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor, fx

from adaptc.errors import Refusal
from adaptc.ir.graph import Graph
from adaptc.quantization.codebook import SMALLEST_KERNEL, TableBlocks, product_kernel
from adaptc.quantization.integer import IntegerBlocks, unpack
from adaptc.quantization.operators import LINEAR, tensors_by_name
from adaptc.quantization.scheme import Scheme, scheme_of
from adaptc.rewriter.pipeline import Pass, graph_pass
from adaptc.rewriter.quantize import drop_unread_quantized
from adaptc.weights import Deferred, Weight

aten = torch.ops.aten
BLOCKS = (32, 64, 128, 256)
"""Blocks that torch's products with 4-bit weights take."""
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
"""What bitsandbytes multiplies with."""
MIDDLE = 8.0
"""The code that they read as zero."""


class Product:
    """`linear(x, W, bias)` of a graph that will run on a device, for a W `(rows, columns)` that bits stand for."""

    def __init__(self, graph: Graph, node: fx.Node, device: str):
        args: Any = node.args
        self.graph, self.node, self.device = graph, node, device
        self.x, tensors, self.bias, text, self.rows, self.columns = args
        self.scheme: Scheme = scheme_of(text)
        self.held: dict[str, fx.Node] = tensors_by_name(tensors, text, self.rows, self.columns)
        self.weights: dict[str, Weight] = {n: graph.weights[str(t.target)] for n, t in self.held.items()}
        self.prefix = str(tensors[0].target).removesuffix("codes")

    @property
    def dtype(self) -> torch.dtype:
        """Of x."""
        return self.x.meta["val"].dtype

    def stored(self, name: str) -> Tensor:
        """What the scheme stores under a name."""
        return self.weights[name].load()

    def call(self, target: Any, *args: Any) -> fx.Node:
        """An operation in place of the product."""
        return self.graph.call(target, *args, like=self.node)

    def attached(self, name: str, like: Tensor, make: Callable[[], Tensor]) -> fx.Node:
        """A tensor beside those of the weight, of the shape and dtype of `like`; made when it is loaded."""
        if self.prefix + name not in self.graph.weights:
            weight = Deferred(tuple(like.shape), like.dtype, make)
            self.graph.attach(self.prefix + name, weight, trained=False)
        return self.graph.parameter_node(self.prefix + name)

    def flat(self, multiply: Callable[[fx.Node], fx.Node]) -> fx.Node:
        """The product by a kernel that takes rows of x alone, and no bias."""
        rows = self.call(aten.reshape.default, self.x, [-1, self.columns])
        y = multiply(self.call(aten.contiguous.default, rows))
        shape = [self.call(aten.sym_size.int, self.x, axis) for axis in range(self.x.meta["val"].dim() - 1)]
        y = self.call(aten.reshape.default, y, [*shape, self.rows])
        return y if self.bias is None else self.call(aten.add.Tensor, y, self.bias)


@dataclass(frozen=True)
class Kernel:
    """One way to compute a product.

    Attributes:
        most: rows of x up to which it is faster than making the weight.
        takes: whether it computes such a product.
        call: inserts it.
    """

    most: float
    takes: Callable[[Product], bool]
    call: Callable[[Product], fx.Node]


def takes_eight_bits(product: Product) -> bool:
    """bfloat16 with 8 bits and one scale a row."""
    s = product.scheme
    if not isinstance(s, IntegerBlocks) or s.calibrated or not s.symmetric:
        return False
    return s.bits == 8 and s.block_size is None and product.dtype == torch.bfloat16


def eight_bits(product: Product) -> fx.Node:
    """`_weight_int8pack_mm(x, codes, scales)`: codes int8 (rows, columns) around zero, scales (rows)."""
    rows, columns, stored = product.rows, product.columns, product.stored
    codes = torch.empty((rows, columns), dtype=torch.int8, device="meta")
    scales = torch.empty((rows,), dtype=torch.bfloat16, device="meta")
    codes = product.attached("signed", codes, lambda: (stored("codes")[:, 0].short() - 128).to(torch.int8))
    scales = product.attached("row_scales", scales, lambda: stored("scales")[:, 0])
    return product.flat(lambda x: product.call(aten._weight_int8pack_mm.default, x, codes, scales))


def takes_four_bits(product: Product) -> bool:
    """bfloat16 with 4 bits in whole blocks."""
    s = product.scheme
    if not isinstance(s, IntegerBlocks) or s.calibrated or s.bits != 4 or s.block_size not in BLOCKS:
        return False
    return not product.columns % s.block_size and not product.rows % 16 and product.dtype == torch.bfloat16


def takes_tiles(product: Product) -> bool:
    """The same, where the tensor cores know bfloat16."""
    return takes_four_bits(product) and multiplies_bfloat16(product.device)


def multiplies_bfloat16(device: str) -> bool:
    """Whether a GPU's tensor cores do: from Ampere on (compute capability 8.0)."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def four_bits(operation: Any, pack: Callable[[Tensor], Tensor]) -> Callable[[Product], fx.Node]:
    """`operation(x, pack(codes), block, ranges)`: of every block a scale and what stands for the middle code.

    Args:
        operation: torch's product.
        pack: codes uint8 (rows, columns) as it wants them; computed on the device that it runs on.
    """

    def call(product: Product) -> fx.Node:
        s: Any = product.scheme
        rows, columns, stored = product.rows, product.columns, product.stored
        codes = pack(torch.empty((rows, columns), dtype=torch.uint8, device="meta"))
        ranges = torch.empty((columns // s.block_size, rows, 2), dtype=torch.bfloat16, device="meta")
        codes = product.attached(
            "packed", codes, lambda: pack(unpack(stored("codes"), 4).flatten(1).to(product.device))
        )
        ranges = product.attached("ranges", ranges, lambda: _ranges(s, stored))
        return product.flat(lambda x: product.call(operation, x, codes, s.block_size, ranges))

    return call


def _ranges(scheme: IntegerBlocks, stored: Callable[[str], Tensor]) -> Tensor:
    """A scale and what stands for the middle code, of every block: (blocks, rows, 2)."""
    scales = stored("scales")
    zeros: Any = MIDDLE
    if not scheme.symmetric:
        zeros = unpack(stored("zeros"), 4)[:, : scales.shape[1]].float()
    return torch.stack([scales, scales * (MIDDLE - zeros)], -1).transpose(0, 1).contiguous()


def in_bytes(codes: Tensor) -> Tensor:
    """As a CPU wants them: uint8 (rows, columns / 2), in an order of this machine's own."""
    return aten._convert_weight_to_int4pack_for_cpu(codes.int(), 8)


def in_tiles(codes: Tensor) -> Tensor:
    """As a GPU's tensor cores want them: int32 (rows / 8, columns / 16 n, 32, n / 2), n tiles a time, at most 8."""
    tiles = next(n for n in (8, 4, 2) if codes.shape[1] % (16 * n) == 0)
    return aten._convert_weight_to_int4pack((codes[:, ::2] << 4 | codes[:, 1::2]).contiguous(), tiles)


def takes_tables(product: Product) -> bool:
    """Whole blocks that look up a table, where bitsandbytes with the kernel is installed."""
    s, bias = product.scheme, product.bias
    if not isinstance(s, TableBlocks) or s.block_size < SMALLEST_KERNEL or product.columns % s.block_size:
        return False
    plain = bias is None or bias.meta["val"].dtype == product.dtype
    return plain and product.dtype in FLOATS and product_kernel() is not None


def tables(product: Product) -> fx.Node:
    """bitsandbytes' `gemm_4bit`, which chooses by the rows of x how it goes about it."""
    s: Any = product.scheme
    held = product.held
    codes = product.call(aten.unsqueeze.default, held["codes"], 1)
    size = [product.rows, product.columns]
    how = s.block_size, s.name, product.bias
    if not s.double:
        return product.call(product_kernel(), product.x, codes, size, held["absmax"], *how)
    nested = held["absmax_codes"], held["nested_table"], held["absmax_offset"]
    return product.call(product_kernel(), product.x, codes, size, held["absmax_scales"], *how, *nested)


KERNELS = {
    "cpu": (
        Kernel(4, takes_eight_bits, eight_bits),
        Kernel(4, takes_four_bits, four_bits(aten._weight_int4pack_mm_for_cpu.default, in_bytes)),
    ),
    "cuda": (
        Kernel(64, takes_tiles, four_bits(aten._weight_int4pack_mm.default, in_tiles)),
        Kernel(inf, takes_tables, tables),
    ),
}
"""By the type of device. Rows on a CPU are measured here; those of tensor cores are torchao's (its benchmark on an
A6000: ahead of making the weight at 64 rows, level at 128). Torch's 8-bit product is not among those of a GPU, where it
computes one number a thread, in float32 (int8mm.cu)."""


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
            reason = f"device: torch does not reach {self.device!r} here: {why}"
            return [Refusal(reason, notes=("expected one such as 'cpu' or 'cuda'",))]
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
        drop_unread_quantized(
            graph, [name for name, q in graph.quantized.items() if q.tensors["codes"] not in read]
        )
        return changed
