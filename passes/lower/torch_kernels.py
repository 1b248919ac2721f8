"""Kernels that multiply by quantized weights as they are packed: torch's own, and bitsandbytes'."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor, fx

from adaptc.errors import Refusal
from adaptc.ir.graph import Graph
from adaptc.quantization.codebook import SMALLEST_KERNEL, TableBlocks, matmul_kernel
from adaptc.quantization.integer import IntegerBlocks, unpack
from adaptc.quantization.operators import LINEAR, tensors_by_name
from adaptc.quantization.scheme import Scheme, scheme_of
from adaptc.rewriter.pipeline import Pass, graph_pass
from adaptc.rewriter.quantize import drop_unread_quantized
from adaptc.weights import Deferred, Weight

aten = torch.ops.aten
BLOCKS = (32, 64, 128, 256)
"""Block sizes that torch's products with 4-bit weights take."""
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
"""Dtypes of x that bitsandbytes multiplies."""
MIDDLE = 8.0
"""The 4-bit code that torch's kernels read as zero."""


class QuantizedLinear:
    """A node `linear(x, W, bias)` of a graph that will run on a device, for a quantized W `(rows, columns)`.

    Attributes:
        x: the node of the inputs `(..., columns)`.
        bias: the node of the bias `(rows,)`, or None.
        scheme: the scheme that stores W.
        operands: argument of the scheme's `dequantize` -> the node that reads the tensor.
        weights: the same arguments -> the tensor, loaded on request.
        prefix: what the names of W's tensors in the graph begin with.
    """

    def __init__(self, graph: Graph, node: fx.Node, device: str):
        args: Any = node.args
        self.graph, self.node, self.device = graph, node, device
        self.x, tensors, self.bias, text, self.rows, self.columns = args
        self.scheme: Scheme = scheme_of(text)
        self.operands: dict[str, fx.Node] = tensors_by_name(tensors, text, self.rows, self.columns)
        self.weights: dict[str, Weight] = {n: graph.weights[str(t.target)] for n, t in self.operands.items()}
        self.prefix = str(tensors[0].target).removesuffix("codes")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of x."""
        return self.x.meta["val"].dtype

    def stored(self, name: str) -> Tensor:
        """The tensor that the scheme stores under a name."""
        return self.weights[name].load()

    def call(self, target: object, *args: Any) -> fx.Node:
        """Insert an operation in front of the node."""
        return self.graph.call(target, *args, like=self.node)

    def attached(self, name: str, like: Tensor, make: Callable[[], Tensor]) -> fx.Node:
        """The node of one more tensor of the weight, of the shape and dtype of `like`; loading it calls `make`."""
        if self.prefix + name not in self.graph.weights:
            weight = Deferred(tuple(like.shape), like.dtype, make)
            self.graph.attach(self.prefix + name, weight, trained=False)
        return self.graph.parameter_node(self.prefix + name)

    def flat(self, multiply: Callable[[fx.Node], fx.Node]) -> fx.Node:
        """The result of a kernel that takes x as a matrix `(n, columns)`, and no bias: reshaped, and the bias added."""
        rows = self.call(aten.reshape.default, self.x, [-1, self.columns])
        y = multiply(self.call(aten.contiguous.default, rows))
        shape = [self.call(aten.sym_size.int, self.x, axis) for axis in range(self.x.meta["val"].dim() - 1)]
        y = self.call(aten.reshape.default, y, [*shape, self.rows])
        return y if self.bias is None else self.call(aten.add.Tensor, y, self.bias)


@dataclass(frozen=True)
class Kernel:
    """One way to compute a quantized linear layer.

    Attributes:
        max_rows: rows of x up to which it is faster than dequantizing the weight.
        takes: whether it computes such a layer.
        call: inserts it, and gives the node of the result.
    """

    max_rows: float
    takes: Callable[[QuantizedLinear], bool]
    call: Callable[[QuantizedLinear], fx.Node]


def takes_eight_bits(linear: QuantizedLinear) -> bool:
    """Whether x is bfloat16, and W has 8 bits and one scale a row."""
    s = linear.scheme
    if not isinstance(s, IntegerBlocks) or s.calibrated or not s.symmetric:
        return False
    return s.bits == 8 and s.block_size is None and linear.dtype == torch.bfloat16


def eight_bits(linear: QuantizedLinear) -> fx.Node:
    """`_weight_int8pack_mm(x, codes, scales)`: codes int8 (rows, columns) around zero, scales (rows)."""
    rows, columns, stored = linear.rows, linear.columns, linear.stored
    codes = torch.empty((rows, columns), dtype=torch.int8, device="meta")
    scales = torch.empty((rows,), dtype=torch.bfloat16, device="meta")
    codes = linear.attached("signed", codes, lambda: (stored("codes")[:, 0].short() - 128).to(torch.int8))
    scales = linear.attached("row_scales", scales, lambda: stored("scales")[:, 0])
    return linear.flat(lambda x: linear.call(aten._weight_int8pack_mm.default, x, codes, scales))


def takes_four_bits(linear: QuantizedLinear) -> bool:
    """Whether x is bfloat16, and W has 4 bits in whole blocks."""
    s = linear.scheme
    if not isinstance(s, IntegerBlocks) or s.calibrated or s.bits != 4 or s.block_size not in BLOCKS:
        return False
    return not linear.columns % s.block_size and not linear.rows % 16 and linear.dtype == torch.bfloat16


def takes_tiles(linear: QuantizedLinear) -> bool:
    """Whether x is bfloat16, W has 4 bits in whole blocks, and the GPU's tensor cores multiply bfloat16."""
    return takes_four_bits(linear) and multiplies_bfloat16(linear.device)


def multiplies_bfloat16(device: str) -> bool:
    """Whether a GPU's tensor cores multiply bfloat16: from Ampere on (compute capability 8.0)."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def four_bits(operation: object, pack: Callable[[Tensor], Tensor]) -> Callable[[QuantizedLinear], fx.Node]:
    """A kernel that calls `operation(x, pack(codes), block, ranges)`; see `_ranges`.

    Args:
        operation: torch's operation.
        pack: arranges codes, uint8 (rows, columns), as the operation takes them; it runs on the same device.
    """

    def call(linear: QuantizedLinear) -> fx.Node:
        s: Any = linear.scheme
        rows, columns, stored = linear.rows, linear.columns, linear.stored
        codes = pack(torch.empty((rows, columns), dtype=torch.uint8, device="meta"))
        ranges = torch.empty((columns // s.block_size, rows, 2), dtype=torch.bfloat16, device="meta")
        codes = linear.attached(
            "packed", codes, lambda: pack(unpack(stored("codes"), 4).flatten(1).to(linear.device))
        )
        ranges = linear.attached("ranges", ranges, lambda: _ranges(s, stored))
        return linear.flat(lambda x: linear.call(operation, x, codes, s.block_size, ranges))

    return call


def _ranges(scheme: IntegerBlocks, stored: Callable[[str], Tensor]) -> Tensor:
    """The scale of each block, and the value of the code in the middle: (blocks, rows, 2)."""
    scales = stored("scales")
    zeros: float | Tensor = MIDDLE
    if not scheme.symmetric:
        zeros = unpack(stored("zeros"), 4)[:, : scales.shape[1]].float()
    return torch.stack([scales, scales * (MIDDLE - zeros)], -1).transpose(0, 1).contiguous()


def in_bytes(codes: Tensor) -> Tensor:
    """Codes as the CPU kernel takes them: uint8 (rows, columns / 2), in an order that depends on the machine."""
    return aten._convert_weight_to_int4pack_for_cpu(codes.int(), 8)


def in_tiles(codes: Tensor) -> Tensor:
    """Codes as the GPU kernel takes them: int32 (rows / 8, columns / 16 n, 32, n / 2), n tiles at a time, at most 8."""
    tiles = next(n for n in (8, 4, 2) if codes.shape[1] % (16 * n) == 0)
    return aten._convert_weight_to_int4pack((codes[:, ::2] << 4 | codes[:, 1::2]).contiguous(), tiles)


def takes_tables(linear: QuantizedLinear) -> bool:
    """Whether W has a table and whole blocks, and bitsandbytes with its kernel `gemm_4bit` is installed."""
    s, bias = linear.scheme, linear.bias
    if not isinstance(s, TableBlocks) or s.block_size < SMALLEST_KERNEL or linear.columns % s.block_size:
        return False
    one_dtype = bias is None or bias.meta["val"].dtype == linear.dtype
    return one_dtype and linear.dtype in FLOATS and matmul_kernel() is not None


def tables(linear: QuantizedLinear) -> fx.Node:
    """bitsandbytes' `gemm_4bit(x, codes, size, scales, block_size, table, bias)`, for any number of rows of x."""
    s: Any = linear.scheme
    operands = linear.operands
    codes = linear.call(aten.unsqueeze.default, operands["codes"], 1)
    size = [linear.rows, linear.columns]
    options = s.block_size, s.name, linear.bias
    if not s.double:
        return linear.call(matmul_kernel(), linear.x, codes, size, operands["absmax"], *options)
    nested = operands["absmax_codes"], operands["nested_table"], operands["absmax_offset"]
    return linear.call(matmul_kernel(), linear.x, codes, size, operands["absmax_scales"], *options, *nested)


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
"""Type of device -> its kernels. `max_rows` on a CPU is measured (docs/decisions/022); on tensor cores it is from
torchao's benchmark on an A6000, where the kernel is faster than dequantizing at 64 rows, and as fast at 128. A GPU has
no 8-bit entry: there torch's kernel computes one number a thread, in float32 (int8mm.cu)."""


@graph_pass("torch-kernels")
@dataclass(frozen=True)
class TorchKernels(Pass):
    """quantized_linear(x, q) by a kernel that reads the packed codes, for inference: these kernels have no gradient.

    On a CPU, for up to 4 rows of x in bfloat16: _weight_int8pack_mm of int8 with one scale a row, and
    _weight_int4pack_mm_for_cpu of int4 in blocks of 32 to 256; in other dtypes, and for more rows, torch's kernels are
    slower than dequantizing the weight. On a GPU: _weight_int4pack_mm of the same int4, for up to 64 rows, and
    bitsandbytes' gemm_4bit of its own formats, for any number of rows. On other devices: none.
    """

    tokens: int = 1
    device: str = "cpu"

    def requires(self, graph: Graph) -> list[Refusal]:
        """Torch can use the device here."""
        try:
            torch.empty(0, device=torch.device(self.device))
        except (RuntimeError, AssertionError, TypeError, ImportError) as error:
            why = str(error).splitlines()[0][:100]
            reason = f"device: torch does not reach {self.device!r} here: {why}"
            return [Refusal(reason, notes=("expected one such as 'cpu' or 'cuda'",))]
        return []

    def call(self, graph: Graph) -> bool:
        """Rewrite the layers that one of the device's kernels computes."""
        kernels = [k for k in KERNELS.get(torch.device(self.device).type, ()) if self.tokens <= k.max_rows]
        changed = False
        for node in [n for n in graph.nodes if n.target is LINEAR]:
            linear = QuantizedLinear(graph, node, self.device)
            kernel: Kernel | None = next((k for k in kernels if k.takes(linear)), None)
            if kernel is None:
                continue
            with graph.module.graph.inserting_before(node):
                result = kernel.call(linear)
            node.replace_all_uses_with(result)
            graph.module.graph.erase_node(node)
            changed = True
        graph.module.graph.eliminate_dead_code()
        read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
        drop_unread_quantized(
            graph, [name for name, q in graph.quantized.items() if q.tensors["codes"] not in read]
        )
        return changed
