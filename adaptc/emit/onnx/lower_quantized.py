"""Quantized matrix products and lookups in ONNX: ONNX Runtime's own operations, or standard ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch.nn.functional import pad

from adaptc.emit.onnx import quantized_operations as quantized_symbols
from adaptc.ir.graph import Graph
from adaptc.quantization.codebook import TableBlocks
from adaptc.quantization.integer import IntegerBlocks, pack, unpack
from adaptc.quantization.operators import DEQUANTIZE, EMBEDDING, LINEAR, tensors_by_name
from adaptc.quantization.scheme import Scheme, scheme_of
from adaptc.rewriter.expression import splice, trace_expression
from adaptc.rewriter.pipeline import Pass
from adaptc.weights import Deferred, Weight

onnx = quantized_symbols.onnx
aten = torch.ops.aten
RUNTIME_BLOCK = 128
"""The largest block for an operation that needs blocks, of a scheme that has one scale for each row."""
LARGEST_BLOCK = 256
"""The largest block of MatMulBnb4; with larger ones the program dequantizes the weight."""
ROUNDED, FLOAT = 4, 0
"""`accuracy_level` of MatMulNBits: activations rounded to 8 bits in blocks, or not rounded."""


@dataclass(frozen=True)
class Integers(Weight):
    """Integers of less than a byte: one in each byte when loaded, packed in a file.

    Attributes:
        shape: how many integers.
        bits: of each integer.
        make: computes them.
        dtype: the dtype when loaded.
    """

    shape: tuple[int, ...]
    bits: int
    make: Callable[[], torch.Tensor]
    dtype: torch.dtype = torch.uint8

    def load(self) -> torch.Tensor:
        """The integers, one in each byte."""
        return self.make()


@dataclass(frozen=True)
class OnnxProducts(Pass):
    """Write every quantized matrix product and lookup in operations that ONNX has. Integers must be plain.

    Attributes:
        runtime: `onnxruntime` for ONNX Runtime's own operations, `standard` for those of ONNX.
        exact: never round activations, so that a proof sees no other rounding.
    """

    runtime: str = "onnxruntime"
    exact: bool = False

    name: ClassVar[str] = "onnx-products"
    takes: ClassVar[frozenset[str]] = frozenset({"evaluated"})
    changes_results: ClassVar[bool] = True

    def call(self, graph: Graph) -> bool:
        """Rewrite each matrix product, lookup and dequantized matrix."""
        quantized = [node for node in graph.nodes if node.target in (LINEAR, EMBEDDING, DEQUANTIZE)]
        for node in quantized:
            with graph.module.graph.inserting_before(node):
                lowering = _Lowering(graph, node, self.runtime, self.exact)
                kinds: dict[Any, Callable[[], fx.Node]] = {
                    LINEAR: lowering.product,
                    EMBEDDING: lowering.lookup,
                }
                result = kinds.get(node.target, lowering.matrix)()
            node.replace_all_uses_with(result)
            graph.module.graph.erase_node(node)
        return bool(quantized)

    def ensures(self, graph: Graph) -> str | None:
        """No operation remains that only torch has."""
        names = [f"%{n.name}" for n in graph.nodes if n.target in (LINEAR, EMBEDDING, DEQUANTIZE)]
        return f"not lowered to ONNX: {', '.join(names)}" if names else None


@dataclass
class _Lowering:
    """The lowering of one node, in front of which its operations are inserted."""

    graph: Graph
    node: fx.Node
    runtime: str
    exact: bool

    def product(self) -> fx.Node:
        """The operations of `linear(x, W, bias)`."""
        args: Any = self.node.args
        x, tensors, bias, text, rows, columns = args
        scheme, held = scheme_of(text), tensors_by_name(tensors, text, rows, columns)
        if isinstance(scheme, TableBlocks):
            y = self._table(x, held, scheme, rows, columns)
        elif isinstance(scheme, IntegerBlocks) and scheme.integer_products and not self.exact:
            y = self._integer(x, held, scheme, columns)
        elif isinstance(scheme, IntegerBlocks) and self.runtime == "onnxruntime":
            return self._nbits(x, held, scheme, rows, columns, bias)
        elif isinstance(scheme, IntegerBlocks):
            y = self._dequantized(x, held, scheme, rows, columns)
        else:
            W = self._whole(held, scheme, rows, columns, x.meta["val"].dtype)
            return self.call(aten.linear.default, x, W, *([] if bias is None else [bias]))
        return y if bias is None else self.call(aten.add.Tensor, y, bias)

    def lookup(self) -> fx.Node:
        """The operations of `embedding(W, ids)`, which read only the rows that are looked up."""
        args: Any = self.node.args
        ids, tensors, text, rows, columns, dtype = args
        scheme, held = scheme_of(text), tensors_by_name(tensors, text, rows, columns)
        if isinstance(scheme, IntegerBlocks) and self._gathered(scheme, columns):
            block = scheme.block(columns)
            flat = self.call(aten.reshape.default, held["codes"], [rows, -1])
            parts = (flat, held["scales"], held.get("zeros"), scheme.bits, block)
            looked_up = self.call(onnx.gather_blocks.default, ids, *parts)
        else:

            def lookup(ids: torch.Tensor, **tensors: torch.Tensor) -> torch.Tensor:
                return scheme.lookup(rows, columns, tensors, ids)

            looked_up = self._traced(lookup, {"ids": ids, **held})
        return self._as(looked_up, dtype)

    def _gathered(self, scheme: IntegerBlocks, columns: int) -> bool:
        """Whether ONNX Runtime looks up rows of the codes: of 4 and 8 bits, in whole blocks."""
        supported = self.runtime == "onnxruntime" and scheme.bits > 2 and scheme.block_size is not None
        return supported and columns % scheme.block(columns) == 0

    def _as(self, value: fx.Node, dtype: torch.dtype) -> fx.Node:
        """A float32 value in another dtype."""

        def cast(value: torch.Tensor) -> torch.Tensor:
            return value.to(dtype)

        return value if dtype == torch.float32 else self._traced(cast, {"value": value})

    def matrix(self) -> fx.Node:
        """The operations of the dequantized matrix, which a convolution or a batch of experts computes with."""
        args: Any = self.node.args
        tensors, text, rows, columns, dtype = args
        return self._whole(
            tensors_by_name(tensors, text, rows, columns), scheme_of(text), rows, columns, dtype
        )

    def _whole(
        self, held: dict[str, Any], scheme: Scheme, rows: int, columns: int, dtype: torch.dtype
    ) -> fx.Node:
        """The dequantized matrix (rows, columns), by the scheme's own formula."""

        def dequantize(**tensors: torch.Tensor) -> torch.Tensor:
            return scheme.dequantize(rows, columns, tensors).to(dtype)

        return self._traced(dequantize, held)

    def _table(
        self, x: fx.Node, held: dict[str, Any], scheme: TableBlocks, rows: int, columns: int
    ) -> fx.Node:
        """The product with a weight of a table of values: MatMulBnb4, or one with the dequantized weight."""

        def scales(**tensors: torch.Tensor) -> torch.Tensor:
            return scheme.absmax(tensors)

        absmax = self._traced(scales, held) if scheme.double else held["absmax"]
        if self.runtime == "onnxruntime" and scheme.block_size <= LARGEST_BLOCK:
            sizes = (rows, columns, scheme.block_size, scheme.runtime_type)
            return self.call(onnx.matmul_bnb4.default, x, held["codes"], absmax, *sizes)
        W = self._whole(held, scheme, rows, columns, x.meta["val"].dtype)
        return self.call(aten.linear.default, x, W)

    def _nbits(
        self, x: fx.Node, held: dict[str, Any], scheme: IntegerBlocks, rows: int, columns: int, bias: object
    ) -> fx.Node:
        """The product with a weight of integers: MatMulNBits."""
        block = runtime_block(scheme, columns)
        if scheme.block_size is None:
            held = self._regrouped(held, scheme, rows, columns, block)
        accuracy = FLOAT if self.exact else ROUNDED
        parts = (held["codes"], held["scales"], held.get("zeros"), bias)
        return self.call(onnx.matmul_nbits.default, x, *parts, rows, columns, scheme.bits, block, accuracy)

    def _regrouped(
        self, held: dict[str, Any], scheme: IntegerBlocks, rows: int, columns: int, block: int
    ) -> dict[str, Any]:
        """The stored tensors with a scale for each block, of a scheme that has one for each row."""
        n, weights = -(-columns // block), self._weights(held)

        def codes() -> torch.Tensor:
            whole = unpack(weights["codes"].load(), scheme.bits).flatten(1)[:, :columns]
            padded = pad(whole, (0, n * block - columns))
            return pack(padded.reshape(rows, n, block), scheme.bits)

        def zeros() -> torch.Tensor:
            return pack(unpack(weights["zeros"].load(), scheme.bits)[:, :1].expand(-1, n), scheme.bits)

        regrouped = {
            "codes": self.weight(held["codes"], (rows, n, block * scheme.bits // 8), torch.uint8, codes),
            "scales": self.weight(
                held["scales"], (rows, n), torch.float32, lambda: weights["scales"].load().expand(-1, n)
            ),
        }
        if not scheme.symmetric:
            size = -(-n * scheme.bits // 8)
            regrouped["zeros"] = self.weight(held["zeros"], (rows, size), torch.uint8, zeros)
        return regrouped

    def _dequantized(
        self, x: fx.Node, held: dict[str, Any], scheme: IntegerBlocks, rows: int, columns: int
    ) -> fx.Node:
        """The product by standard operations, on codes (in, out) with blocks along the first axis.

        ONNX Runtime fuses these to one operation.
        """
        n, block, weights = scheme.blocks(columns), scheme.block(columns), self._weights(held)
        per_row = scheme.block_size is None
        # ONNX Runtime (1.31) fuses these to a wrong product where a row of 2-bit codes ends within a byte.
        missing = -rows % (8 // scheme.bits)

        def codes() -> torch.Tensor:
            whole = unpack(weights["codes"].load(), scheme.bits).flatten(1)[:, :columns]
            return pad(whole, (0, 0, 0, missing)).t().contiguous()

        def zeros() -> torch.Tensor:
            if scheme.symmetric:
                return torch.full(shape, 2 ** (scheme.bits - 1), dtype=torch.uint8)
            offsets = pad(unpack(weights["zeros"].load(), scheme.bits)[:, :n], (0, 0, 0, missing)).t()
            return offsets[0].contiguous() if per_row else offsets.contiguous()

        def scales() -> torch.Tensor:
            steps = pad(weights["scales"].load(), (0, 0, 0, missing), value=1.0).t()
            return steps[0].contiguous() if per_row else steps.contiguous()

        every = rows + missing
        shape = (every,) if per_row else (n, every)
        zeros_name = str(held["codes"].target).removesuffix("codes") + "zeros"
        q = self.integers(str(held["codes"].target), (columns, every), scheme.bits, codes)
        s = self.weight(held["scales"], shape, torch.float32, scales)
        z = self.integers(zeros_name, shape, scheme.bits, zeros)
        y = self.call(onnx.matmul_dequantized.default, x, q, s, z, every, 0 if per_row else block)
        return self.call(aten.slice.Tensor, y, -1, 0, rows) if missing else y

    def _integer(self, x: fx.Node, held: dict[str, Any], scheme: IntegerBlocks, columns: int) -> fx.Node:
        """The product of 8-bit integers, one range for all activations; codes are signed and (in, out) for speed."""
        weights = self._weights(held)

        def codes() -> torch.Tensor:
            whole = unpack(weights["codes"].load(), 8).flatten(1)[:, :columns]
            return (whole.short() - 128).to(torch.int8).t().contiguous()

        rows = weights["scales"].shape[0]
        q = self.weight(held["codes"], (columns, rows), torch.int8, codes)
        s = self.weight(held["scales"], (rows,), torch.float32, lambda: weights["scales"].load()[:, 0])
        return self.call(onnx.matmul_integer.default, x, q, s)

    def _weights(self, held: dict[str, Any]) -> dict[str, Weight]:
        """The stored tensors by their names in the scheme, to be loaded."""
        return {key: self.graph.weights[str(node.target)] for key, node in held.items()}

    def weight(
        self, like: fx.Node, shape: tuple[int, ...], dtype: torch.dtype, make: Callable[[], torch.Tensor]
    ) -> fx.Node:
        """A stored tensor in another layout, under a name of its own."""
        return self._attached(f"{like.target}_laid_out", Deferred(shape, dtype, lambda: make().contiguous()))

    def integers(
        self, name: str, shape: tuple[int, ...], bits: int, make: Callable[[], torch.Tensor]
    ) -> fx.Node:
        """Codes of less than a byte, which a file holds packed."""
        return self._attached(f"{name}_laid_out", Integers(shape, bits, make))

    def _attached(self, name: str, weight: Weight) -> fx.Node:
        """The node that reads a weight, which is added to the graph unless another product has added it."""
        if name not in self.graph.weights:
            self.graph.attach(name, weight, trained=False)
        return self.graph.parameter_node(name)

    def _traced(self, function: Callable[..., torch.Tensor], held: dict[str, Any]) -> fx.Node:
        """The operations of a function of named tensors."""
        with self.graph.fake_mode:
            traced = trace_expression(function, [], {k: n.meta["val"] for k, n in held.items()})
        return splice(self.graph, traced, list(held.values()), self.node, {})

    def call(self, target: object, *args: Any) -> fx.Node:
        """Insert one operation in front of the node."""
        return self.graph.call(target, *args, like=self.node)


def runtime_block(scheme: IntegerBlocks, columns: int) -> int:
    """The block of MatMulNBits, in columns that share a scale.

    It is the scheme's own block. For a scheme with one scale for each row it is the largest of 128, 64, 32 and 16
    that divides the columns, and 32 if none does.
    """
    if scheme.block_size is not None:
        return scheme.block(columns)
    return next((b for b in (RUNTIME_BLOCK, 64, 32, 16) if columns % b == 0), 32)
