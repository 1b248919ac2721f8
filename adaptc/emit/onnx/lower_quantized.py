"""Quantized products and lookups as ONNX has them: ONNX Runtime's own operations, or standard ones."""

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
"""Columns that share a scale where a whole row does, for operations that want blocks: the largest that fit."""
LARGEST_BLOCK = 256
"""Of MatMulBnb4; with larger ones the weight is made in the program."""
ROUNDED, FLOAT = 4, 0
"""`accuracy_level` of MatMulNBits: activations rounded to 8 bits in blocks, or as they are."""


@dataclass(frozen=True)
class Integers(Weight):
    """Integers of less than a byte, one a byte here; a file holds them packed."""

    shape: tuple[int, ...]
    bits: int
    make: Callable[[], torch.Tensor]
    dtype: torch.dtype = torch.uint8

    def load(self) -> torch.Tensor:
        """One a byte."""
        return self.make()


@dataclass(frozen=True)
class OnnxProducts(Pass):
    """Write every quantized product and lookup in operations that ONNX has. Integers must be plain.

    Attributes:
        runtime: `onnxruntime` for its own operations, `standard` for those of ONNX.
        exact: activations are never rounded: what proves that nothing else is.
    """

    runtime: str = "onnxruntime"
    exact: bool = False

    name: ClassVar[str] = "onnx-products"
    takes: ClassVar[frozenset[str]] = frozenset({"evaluated"})
    changes_results: ClassVar[bool] = True

    def call(self, graph: Graph) -> bool:
        """Rewrite each by itself."""
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
        """No operation is left that only torch has."""
        left = [f"%{n.name}" for n in graph.nodes if n.target in (LINEAR, EMBEDDING, DEQUANTIZE)]
        return f"not written as ONNX has it: {', '.join(left)}" if left else None


@dataclass
class _Lowering:
    """One product or lookup."""

    graph: Graph
    node: fx.Node
    runtime: str
    exact: bool

    def product(self) -> fx.Node:
        """`linear(x, W, bias)`."""
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
        """`embedding(W, ids)`: of what is stored, only the rows that are asked for are read."""
        args: Any = self.node.args
        ids, tensors, text, rows, columns, dtype = args
        scheme, held = scheme_of(text), tensors_by_name(tensors, text, rows, columns)
        if isinstance(scheme, IntegerBlocks) and self._gathered(scheme, columns):
            block = scheme.block(columns)
            flat = self.call(aten.reshape.default, held["codes"], [rows, -1])
            parts = (flat, held["scales"], held.get("zeros"), scheme.bits, block)
            found = self.call(onnx.gather_blocks.default, ids, *parts)
        else:
            found = self._traced(lambda ids, **t: scheme.lookup(rows, columns, t, ids), {"ids": ids, **held})
        return self._as(found, dtype)

    def _gathered(self, scheme: IntegerBlocks, columns: int) -> bool:
        """Whether ONNX Runtime looks up by the bits themselves."""
        known = self.runtime == "onnxruntime" and scheme.bits > 2 and scheme.block_size is not None
        return known and columns % scheme.block(columns) == 0

    def _as(self, value: fx.Node, dtype: torch.dtype) -> fx.Node:
        """What is float32, in another dtype."""
        return value if dtype == torch.float32 else self._traced(lambda v: v.to(dtype), {"v": value})

    def matrix(self) -> fx.Node:
        """The whole matrix: what a convolution or a batch of experts is computed with."""
        args: Any = self.node.args
        tensors, text, rows, columns, dtype = args
        return self._whole(
            tensors_by_name(tensors, text, rows, columns), scheme_of(text), rows, columns, dtype
        )

    def _whole(
        self, held: dict[str, Any], scheme: Scheme, rows: int, columns: int, dtype: torch.dtype
    ) -> fx.Node:
        return self._traced(lambda **t: scheme.dequantize(rows, columns, t).to(dtype), held)

    def _table(
        self, x: fx.Node, held: dict[str, Any], scheme: TableBlocks, rows: int, columns: int
    ) -> fx.Node:
        absmax = self._traced(lambda **t: scheme.absmax(t), held) if scheme.double else held["absmax"]
        if self.runtime == "onnxruntime" and scheme.block_size <= LARGEST_BLOCK:
            sizes = (rows, columns, scheme.block_size, scheme.runtime_type)
            return self.call(onnx.matmul_bnb4.default, x, held["codes"], absmax, *sizes)
        W = self._whole(held, scheme, rows, columns, x.meta["val"].dtype)
        return self.call(aten.linear.default, x, W)

    def _nbits(
        self, x: fx.Node, held: dict[str, Any], scheme: IntegerBlocks, rows: int, columns: int, bias: Any
    ) -> fx.Node:
        block = runtime_block(scheme, columns)
        if scheme.block_size is None:
            held = self._regrouped(held, scheme, rows, columns, block)
        accuracy = FLOAT if self.exact else ROUNDED
        parts = (held["codes"], held["scales"], held.get("zeros"), bias)
        return self.call(onnx.matmul_nbits.default, x, *parts, rows, columns, scheme.bits, block, accuracy)

    def _regrouped(
        self, held: dict[str, Any], scheme: IntegerBlocks, rows: int, columns: int, block: int
    ) -> dict[str, Any]:
        """A scale for each block, where the scheme has one for each row."""
        n, weights = -(-columns // block), self._weights(held)

        def codes() -> torch.Tensor:
            whole = unpack(weights["codes"].load(), scheme.bits).flatten(1)[:, :columns]
            filled = pad(whole, (0, n * block - columns))
            return pack(filled.reshape(rows, n, block), scheme.bits)

        def zeros() -> torch.Tensor:
            return pack(unpack(weights["zeros"].load(), scheme.bits)[:, :1].expand(-1, n), scheme.bits)

        found = {
            "codes": self.weight(held["codes"], (rows, n, block * scheme.bits // 8), torch.uint8, codes),
            "scales": self.weight(
                held["scales"], (rows, n), torch.float32, lambda: weights["scales"].load().expand(-1, n)
            ),
        }
        if not scheme.symmetric:
            size = -(-n * scheme.bits // 8)
            found["zeros"] = self.weight(held["zeros"], (rows, size), torch.uint8, zeros)
        return found

    def _dequantized(
        self, x: fx.Node, held: dict[str, Any], scheme: IntegerBlocks, rows: int, columns: int
    ) -> fx.Node:
        """Standard operations, laid out (in, out) with blocks along the first axis, as ONNX Runtime fuses them."""
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
            found = pad(unpack(weights["zeros"].load(), scheme.bits)[:, :n], (0, 0, 0, missing)).t()
            return found[0].contiguous() if per_row else found.contiguous()

        def scales() -> torch.Tensor:
            found = pad(weights["scales"].load(), (0, 0, 0, missing), value=1.0).t()
            return found[0].contiguous() if per_row else found.contiguous()

        every = rows + missing
        shape = (every,) if per_row else (n, every)
        zeros_name = str(held["codes"].target).removesuffix("codes") + "zeros"
        q = self.integers(str(held["codes"].target), (columns, every), scheme.bits, codes)
        s = self.weight(held["scales"], shape, torch.float32, scales)
        z = self.integers(zeros_name, shape, scheme.bits, zeros)
        y = self.call(onnx.matmul_dequantized.default, x, q, s, z, every, 0 if per_row else block)
        return self.call(aten.slice.Tensor, y, -1, 0, rows) if missing else y

    def _integer(self, x: fx.Node, held: dict[str, Any], scheme: IntegerBlocks, columns: int) -> fx.Node:
        """Activations in 8 bits, a range for all of them; signed codes (in, out), which the fast kernels want."""
        weights = self._weights(held)

        def codes() -> torch.Tensor:
            whole = unpack(weights["codes"].load(), 8).flatten(1)[:, :columns]
            return (whole.short() - 128).to(torch.int8).t().contiguous()

        rows = weights["scales"].shape[0]
        q = self.weight(held["codes"], (columns, rows), torch.int8, codes)
        s = self.weight(held["scales"], (rows,), torch.float32, lambda: weights["scales"].load()[:, 0])
        return self.call(onnx.matmul_integer.default, x, q, s)

    def _weights(self, held: dict[str, Any]) -> dict[str, Weight]:
        return {key: self.graph.weights[str(node.target)] for key, node in held.items()}

    def weight(
        self, like: fx.Node, shape: tuple[int, ...], dtype: torch.dtype, make: Callable[[], torch.Tensor]
    ) -> fx.Node:
        """A stored tensor laid out in another way, under a name of its own."""
        return self._attached(f"{like.target}_laid_out", Deferred(shape, dtype, lambda: make().contiguous()))

    def integers(
        self, name: str, shape: tuple[int, ...], bits: int, make: Callable[[], torch.Tensor]
    ) -> fx.Node:
        """Codes that a file holds packed."""
        return self._attached(f"{name}_laid_out", Integers(shape, bits, make))

    def _attached(self, name: str, weight: Weight) -> fx.Node:
        if name not in self.graph.weights:
            self.graph.attach(name, weight, trained=False)
        return self.graph.parameter_node(name)

    def _traced(self, function: Callable[..., torch.Tensor], held: dict[str, Any]) -> fx.Node:
        with self.graph.fake_mode:
            traced = trace_expression(function, [], {k: n.meta["val"] for k, n in held.items()})
        return splice(self.graph, traced, list(held.values()), self.node, {})

    def call(self, target: Any, *args: Any) -> fx.Node:
        """One operation in place of the node."""
        return self.graph.call(target, *args, like=self.node)


def runtime_block(scheme: IntegerBlocks, columns: int) -> int:
    """Columns that share a scale in MatMulNBits: the scheme's own block; where that is a whole row, the largest of at
    most `RUNTIME_BLOCK` that divides it, and 32 where none from 16 on does.
    """
    if scheme.block_size is not None:
        return scheme.block(columns)
    return next((b for b in (RUNTIME_BLOCK, 64, 32, 16) if columns % b == 0), 32)
