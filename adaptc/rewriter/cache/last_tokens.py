"""What is not computed from the token ids, such as masks and positions: for all tokens, or for the last of them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from typing import Any, cast

import sympy  # pyright: ignore[reportMissingTypeStubs]
import torch
from torch import fx

from adaptc.ir.analysis.token_axes import MixesTokensError, holds_tensor, shape_of
from adaptc.ir.analysis.token_rules import is_elementwise
from adaptc.ir.graph import Graph
from adaptc.ir.nodes import is_tensor, map_operands, operation, size_expression
from adaptc.rewriter.cache.past import Counts

aten = torch.ops.aten
algebra: Any = sympy  # it has no types


class LastTokens:
    """Values for all tokens, of the past and new, and their parts for the new tokens.

    A part is not cut from the whole where it can be computed alone: the cut is pushed towards the inputs.

    Args:
        graph: rewritten in place; new nodes are inserted at the current insertion point.
        tokens: the number of tokens in the trace, as a formula.
        counts: the nodes of the numbers of tokens in the graph with a cache.
        content: what is computed from the token ids.
    """

    def __init__(self, graph: Graph, tokens: Any, counts: Counts, content: Collection[fx.Node]):
        self.graph, self.tokens, self.counts, self.content = graph, tokens, counts, content
        self.traced = {node: node.meta["val"] for node in graph.nodes if "val" in node.meta}
        self.cuts: list[fx.Node] = []
        """Slices of what could not be computed for the new tokens alone."""
        self._whole: dict[fx.Node, fx.Node] = {}
        self._last: dict[tuple[fx.Node, int], fx.Node] = {}
        self._counted: dict[tuple[fx.Node, fx.Node], fx.Node] = {}
        self._rows: dict[fx.Node, fx.Node] = {}

    def shape(self, node: fx.Node) -> list[Any]:
        """The sizes of a tensor in the trace, as formulas."""
        return [size_expression(size) for size in self.traced[node].shape]

    def has_tokens(self, node: Any) -> bool:
        """Whether an axis of a traced tensor is along the tokens."""
        return node in self.traced and is_tensor(node) and self.tokens in self.shape(node)

    def is_size(self, node: fx.Node) -> bool:
        """Whether a traced node is a number, such as a size."""
        return isinstance(self.traced.get(node), torch.SymInt)

    def counts_rows(self, tensor: fx.Node) -> bool:
        """Whether an axis of a traced tensor has an entry for each row, the tokens of all sequences."""
        sizes = [size for size in self.shape(tensor) if size.has(self.tokens)]
        return any(size.subs(self.tokens, 0) == 0 for size in sizes)

    def depends(self, value: Any) -> bool:
        """Whether a traced size or tensor depends on the number of tokens."""
        if not isinstance(value, fx.Node) or value not in self.traced:
            return False
        traced = self.traced[value]
        if isinstance(traced, torch.SymInt):
            return bool(size_expression(traced).has(self.tokens))
        return holds_tensor(value) and any(size.has(self.tokens) for size in shape_of(value))

    def whole(self, value: Any) -> Any:
        """A value for all tokens; constants as they are."""
        if not isinstance(value, fx.Node) or value not in self.traced or value in self.content:
            return value
        if value not in self._whole:
            self._whole[value] = self._make_whole(value)
        return self._whole[value]

    def _make_whole(self, node: fx.Node) -> fx.Node:
        if node.op != "call_function" or node.target is getattr:
            return node
        if isinstance(self.traced[node], torch.SymInt):
            return self.count(node, self.counts.total)
        operands = {n: self.whole(n) for n in node.all_input_nodes}
        inputs = [n for n in node.all_input_nodes if n.op == "placeholder" and self.has_tokens(n)]
        if not inputs and all(n is other for n, other in operands.items()):
            return node
        return self._again(node, operands.__getitem__)

    def count(self, value: Any, tokens: fx.Node) -> Any:
        """A size, with another number of tokens in its formula."""
        if not isinstance(value, fx.Node) or not self.depends(value):
            return value
        if size_expression(self.traced[value]) == self.tokens:
            return tokens
        key = (value, tokens)
        if key not in self._counted:
            again = self._measured if operation(value) == "sym_size" else self._computed
            self._counted[key] = again(value, tokens)
        return self._counted[key]

    def end(self, value: Any) -> Any:
        """A size that says where all tokens end: where the new ones do."""
        return self.count(value, self.counts.end) if isinstance(value, fx.Node) else value

    def _computed(self, size: fx.Node, tokens: fx.Node) -> fx.Node:
        return self._again(size, lambda n: self.count(n, tokens))

    def _measured(self, size: fx.Node, tokens: fx.Node) -> fx.Node:
        """The size of an axis with other entries beside the tokens, or with several for each."""
        formula = size_expression(self.traced[size])
        more, times = formula - self.tokens, algebra.cancel(formula / self.tokens)
        if more.is_Integer:
            return self.call(operator.add, tokens, int(more), like=size)
        if times.is_Integer:
            return self.call(operator.mul, tokens, int(times), like=size)
        others = self._read_from_input(more, size)
        if others is not None:
            return self.call(operator.add, tokens, others, like=size)
        raise MixesTokensError(f"%{size.name} counts other things than tokens")

    def _read_from_input(self, formula: Any, like: fx.Node) -> fx.Node | None:
        """A size as that of an input that is not along the tokens, such as of virtual ones; None without one."""
        for node in self.graph.placeholders:
            shape = [] if node not in self.traced or self.has_tokens(node) else self.shape(node)
            if formula in shape:
                return self.call(aten.sym_size.int, node, shape.index(formula), like=like)
        return None

    def rows(self, node: Any) -> Any:
        """What has as many entries as there are rows, new tokens of all sequences: for those."""
        if not isinstance(node, fx.Node) or node not in self.traced or node.op != "call_function":
            return node
        if isinstance(self.traced[node], torch.SymInt):
            return self.count(node, self.counts.new)
        if node.target is getattr or not is_tensor(node):
            return node
        if node not in self._rows:
            self._rows[node] = self._again(node, self.rows)
        return self._rows[node]

    def last(self, node: fx.Node, axis: int) -> fx.Node:
        """A value for the new tokens alone, along one axis, and for all tokens along others."""
        if self.shape(node)[axis] != self.tokens:
            return self.whole(node)
        key = (node, axis)
        if key not in self._last:
            self._last[key] = self._make_last(node, axis)
        return self._last[key]

    def _make_last(self, node: fx.Node, axis: int) -> fx.Node:
        if node.op == "call_function":
            if is_elementwise(node):
                return self._again(node, lambda n: self._aligned(n, node, axis))
            pushed = PUSHED.get(operation(node))
            result = pushed(self, node, axis) if pushed is not None else None
            if result is not None:
                return result
        return self.cut(node, axis)

    def cut(self, node: fx.Node, axis: int) -> fx.Node:
        """The last rows of a value for all tokens."""
        cut = self.call(
            aten.slice.Tensor, self.whole(node), axis, self.counts.past, self.counts.end, like=node
        )
        self.cuts.append(cut)
        return cut

    def _aligned(self, operand: Any, node: fx.Node, axis: int) -> Any:
        """An operand that is broadcast against the result of `node`, for the new tokens along an axis of the result."""
        if not is_tensor(operand) or operand not in self.traced:
            return self.whole(operand)
        position = axis - (self.traced[node].dim() - self.traced[operand].dim())
        return self.whole(operand) if position < 0 else self.last(operand, position)

    def aligned(self, operand: fx.Node, rank: int, axis: int) -> fx.Node:
        """The same for a result of this rank."""
        return self.last(operand, axis - (rank - self.traced[operand].dim()))

    def call(self, target: Any, *args: Any, like: fx.Node, **kwargs: Any) -> fx.Node:
        """Insert an operation."""
        return self.graph.call(target, *args, like=like, **kwargs)

    def _again(self, node: fx.Node, operand: Callable[[fx.Node], Any]) -> fx.Node:
        """The operation of a node once more, on other operands."""
        args, kwargs = map_operands(node, operand)
        return self.graph.call(node.target, *args, like=node, **kwargs)


def _arange(tokens: LastTokens, node: fx.Node, axis: int) -> fx.Node | None:
    """`arange(start, start + tokens)`, from a constant."""
    args = list(node.args)
    start, end = (0, *args)[-2:] if len(args) < 3 else (None, None)
    if not isinstance(start, int):
        return None
    first = (
        tokens.counts.past if start == 0 else tokens.call(operator.add, tokens.counts.past, start, like=node)
    )
    options = {key: tokens.whole(value) for key, value in node.kwargs.items()}
    return tokens.graph.call(aten.arange.start, first, tokens.end(end), like=node, **options)


def _moved(
    source: Callable[[fx.Node, int], int | None],
) -> Callable[[LastTokens, fx.Node, int], fx.Node | None]:
    """For a view: `source` gives the axis of the operand that an axis of the result is."""

    def push(tokens: LastTokens, node: fx.Node, axis: int) -> fx.Node | None:
        inner = source(node, axis)
        first: Any = node.args[0]
        if inner is None:
            return None
        rest = [tokens.whole(argument) for argument in node.args[1:]]
        return tokens.call(node.target, tokens.last(first, inner), *rest, like=node)

    return push


def _rank(node: fx.Node) -> int:
    return node.meta["val"].dim()


def _of_unsqueeze(node: fx.Node, axis: int) -> int:
    return axis - int(cast(int, node.args[1]) % _rank(node) < axis)


def _of_transpose(node: fx.Node, axis: int) -> int:
    first, second = (cast(int, position) % _rank(node) for position in node.args[1:3])
    return {first: second, second: first}.get(axis, axis)


def _of_permute(node: fx.Node, axis: int) -> int:
    return cast(Sequence[int], node.args[1])[axis] % _rank(node)


def _of_pad(node: fx.Node, axis: int) -> int | None:
    """Only later axes are padded."""
    return axis if len(cast(Sequence[Any], node.args[1])) // 2 <= _rank(node) - 1 - axis else None


def _slice(tokens: LastTokens, node: fx.Node, axis: int) -> fx.Node | None:
    """A slice that takes all, or one along another axis, or the first rows of a table."""
    source: Any = node.args[0]
    _, along, start, end, step = (*node.args, *(None, 0, None, None, 1)[len(node.args) :])
    if tokens.shape(source) == tokens.shape(node):
        return tokens.last(source, axis)
    if cast(int, along) % _rank(node) != axis:
        rest = [tokens.whole(argument) for argument in node.args[1:]]
        return tokens.call(node.target, tokens.last(source, axis), *rest, like=node)
    if start in (0, None) and step == 1:
        return tokens.call(
            node.target, tokens.whole(source), axis, tokens.counts.past, tokens.end(end), like=node
        )
    return None


def _cat(tokens: LastTokens, node: fx.Node, axis: int) -> fx.Node | None:
    parts, *rest = cast(tuple[Any, ...], node.args)
    if (rest[0] if rest else 0) % _rank(node) == axis:
        return None
    return tokens.call(node.target, [tokens.last(part, axis) for part in parts], *rest, like=node)


def _embedding(tokens: LastTokens, node: fx.Node, axis: int) -> fx.Node | None:
    table, indices, *rest = cast(tuple[Any, ...], node.args)
    if axis == _rank(node) - 1:
        return None
    return tokens.call(node.target, tokens.whole(table), tokens.last(indices, axis), *rest, like=node)


def _expand(tokens: LastTokens, node: fx.Node, axis: int) -> fx.Node:
    source, sizes, *_ = cast(tuple[Any, ...], node.args)
    position = axis - (_rank(node) - tokens.traced[source].dim())
    cut = tokens.whole(source) if position < 0 else tokens.last(source, position)
    result = [tokens.whole(size) for size in sizes]
    result[axis] = -1 if isinstance(sizes[axis], int) else tokens.counts.new
    return tokens.call(node.target, cut, result, like=node)


def _index(tokens: LastTokens, node: fx.Node, axis: int) -> fx.Node | None:
    """A lookup with an index for every axis."""
    source, indices = cast(tuple[Any, ...], node.args)
    if any(index is None for index in indices) or len(indices) != tokens.traced[source].dim():
        return None

    def cut(index: fx.Node) -> fx.Node:
        position = axis - (_rank(node) - tokens.traced[index].dim())
        return tokens.whole(index) if position < 0 else tokens.last(index, position)

    return tokens.call(node.target, tokens.whole(source), [cut(index) for index in indices], like=node)


PUSHED: dict[str, Callable[[LastTokens, fx.Node, int], fx.Node | None]] = {
    "arange": _arange,
    "unsqueeze": _moved(_of_unsqueeze),
    "transpose": _moved(_of_transpose),
    "permute": _moved(_of_permute),
    "constant_pad_nd": _moved(_of_pad),
    "slice": _slice,
    "cat": _cat,
    "embedding": _embedding,
    "expand": _expand,
    "index": _index,
}
"""Name of an operation -> how a cut of its result becomes a cut of its operands; None where it does not."""
