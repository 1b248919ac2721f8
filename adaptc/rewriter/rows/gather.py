"""Values of many adapters as one: their tensors are stacked, and each row gathers its own.

Where adapters compute the same operations from tensors of their own, these are computed once, on the tensors that
each row gathers. Nothing here knows a method: the operations of two adapters are laid beside one another.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import fx

from adaptc.ir.nodes import is_tensor, operation
from adaptc.rewriter.rows.batched import Batched
from adaptc.rewriter.rows.builder import Builder
from adaptc.rewriter.rows.row_axis import Rows
from adaptc.weights import Held

aten = torch.ops.aten
Each = tuple[fx.Node | None, ...]
"""A value for each graph; None where there is none, which counts as a zero of a sum and a one of a product."""
CONSTANTS = "adapter_rows"
"""The module that holds the constants of a merged graph."""
ZERO_STAYS = frozenset(
    {"mul", "dropout", "neg", "linear", "mm", "matmul", "to", "_to_copy", "alias"}
    | {"relu", "gelu", "silu", "tanh", "leaky_relu", "elu", "selu", "celu", "mish", "hardswish", "relu6"}
    | {"conv1d", "conv2d", "conv3d", "embedding"}
)
"""Operations that give zeros for zeros: a rank may be padded with them."""


class NotAlikeError(Exception):
    """Values are computed by different operations, or on shapes that do not fit."""


class Gather:
    """Computes what the rows of a batch need of several values, all at once.

    Args:
        build: puts operations into the graph.
        rows: where rows are in a value.
        ids: the input `(rows,)`: the place of an adapter, or -1 for the base.
    """

    def __init__(self, build: Builder, rows: Rows, ids: fx.Node):
        self.build, self.rows, self.ids = build, rows, ids
        self._batched = Batched(build, rows)
        self._weights: dict[fx.Node, bool] = {}
        self._constants: dict[Any, str] = {}

    def value(self, each: Each) -> fx.Node:
        """The rows of several values of one shape.

        Args:
            each: the value of each graph.

        Raises:
            NotAlikeError: they are not computed alike.
        """
        base = next(value for value in each if value is not None)
        terms = [_terms(value, base) if value is not None else [] for value in each]
        if not all(base in some for some in terms) and _has_bias(base):
            terms = [[part for term in some for part in self._without_bias(term)] for some in terms]
        return self._sum(terms)

    def alike(self, each: Each) -> fx.Node:
        """The rows of several values of one shape, all computed by the same operations.

        Args:
            each: the value of each graph; none is the base's.

        Raises:
            NotAlikeError: they are not computed alike.
        """
        return self._alike(each, pads=False)

    def _sum(self, terms: Sequence[Sequence[fx.Node]]) -> fx.Node:
        """The sum of one value of the base and of what is added to it."""
        result = self._core(tuple(some[0] if some else None for some in terms))
        constants = tuple(self._added([t for t in some[1:] if self.is_weight(t)]) for some in terms)
        if any(value is not None for value in constants):
            result = self._plus(result, self._gathered(constants, 0.0))
        rest = [[term for term in some[1:] if not self.is_weight(term)] for some in terms]
        for position in range(max(map(len, rest))):
            each = tuple(some[position] if position < len(some) else None for some in rest)
            result = self._plus(result, self._added_product(each))
        return result

    def _core(self, each: Each) -> fx.Node:
        """One value times scales of each graph's own; the operands of an operation too."""
        values = {value for value in each if value is not None}
        if len(values) == 1:
            return values.pop()
        factors = [self._factors(value) for value in each]
        if any(scale is not None for _, scale in factors) and {core for core, _ in factors} != values:
            inner = self._core(tuple(core for core, _ in factors))
            return self._times(inner, self._gathered(tuple(scale for _, scale in factors), 1.0))
        return self._alike(each, pads=False)

    def _factors(self, value: fx.Node | None) -> tuple[fx.Node | None, fx.Node | None]:
        """A value without a scale that is made of weights alone, and that scale."""
        if value is not None and value.target is aten.mul.Tensor and not self.is_weight(value):
            left, right = value.args
            if isinstance(right, fx.Node) and self.is_weight(right):
                return _node(left), right
            if isinstance(left, fx.Node) and self.is_weight(left):
                return _node(right), left
        return value, None

    def _added_product(self, each: Each) -> fx.Node:
        """A term of a sum that some graphs lack: its own tensors are zeros there."""
        return self._alike(each, pads=False)

    def _alike(self, each: Each, pads: bool) -> fx.Node:
        """One operation on the operands of several that are alike.

        Args:
            each: the results.
            pads: whether results may differ in size, to be padded with zeros.

        Raises:
            NotAlikeError: they are not.
        """
        values = [value for value in each if value is not None]
        if len(set(values)) == 1 and len(values) == len(each):
            return values[0]
        if all(map(self.is_weight, values)):
            return self._gathered(each, 0.0, pads)
        first = values[0]
        if first.op != "call_function" or any(value.target is not first.target for value in values):
            raise NotAlikeError(f"{first.name} is computed in different ways")
        differ = len({str(value.meta["val"].shape) for value in values}) > 1
        if differ and not pads:
            raise NotAlikeError(f"{first.name} has different shapes")
        name = operation(first)
        if (differ or len(values) < len(each)) and name not in ZERO_STAYS:
            raise NotAlikeError(f"{name} of zeros need not be zero")
        return self._operands(each, first, name)

    def _operands(self, each: Each, first: fx.Node, name: str) -> fx.Node:
        """The operation on its joined operands."""
        values = [value for value in each if value is not None]
        if any(len(value.args) != len(first.args) or value.kwargs != first.kwargs for value in values):
            raise NotAlikeError(f"{name} is called in different ways")
        lacking = len(values) < len(each)
        joined: list[Any] = []
        zeroed = not lacking
        for position in range(len(first.args)):
            operands = [value.args[position] if value is not None else None for value in each]
            plain = [value.args[position] for value in values]
            if isinstance(plain[0], (list, tuple)) and any(isinstance(item, fx.Node) for item in plain[0]):
                joined.append(self._listed(plain, lacking))
                continue
            if not all(isinstance(operand, fx.Node) for operand in plain):
                joined.append(self._constant(plain, each, name))
                continue
            weights = all(self.is_weight(_node(operand)) for operand in plain)
            if lacking and not weights:
                operands = [operand if operand is not None else plain[0] for operand in operands]
            zeroed = zeroed or weights
            nodes = tuple(None if operand is None else _node(operand) for operand in operands)
            pads = name in ZERO_STAYS
            joined.append(self._operand(nodes, pads, lacking and weights))
        if not zeroed:  # nothing of its own at this operation: its operand is zero there
            joined = self._zeroed(each, first, joined)
        return self._batched.call(first, joined)

    def _listed(self, lists: Sequence[Any], lacking: bool) -> list[fx.Node]:
        """A list of operands, each joined."""
        if lacking or len({len(items) for items in lists}) > 1:
            raise NotAlikeError("lists of different lengths")
        return [self._operand(tuple(map(_node, items)), False, False) for items in zip(*lists, strict=True)]

    def _operand(self, nodes: Each, pads: bool, lacking: bool) -> fx.Node:
        if not lacking and len(set(nodes)) == 1 and nodes[0] is not None:
            return nodes[0]
        values = [node for node in nodes if node is not None]
        if all(map(self.is_weight, values)):
            return self._gathered(nodes, 0.0, pads)
        if pads:
            return self._alike(nodes, pads=True)
        return self._core(nodes)

    def _zeroed(self, each: Each, first: fx.Node, joined: list[Any]) -> list[Any]:
        """The operands with zeros in the first one where a graph has no such value."""
        inner = tuple(None if value is None else _node(value.args[0]) for value in each)
        return [self._alike(inner, pads=True), *joined[1:]]

    def _constant(self, plain: Sequence[Any], each: Each, name: str) -> Any:
        """An argument that is no value: the same for all; a number that scales may differ."""
        if all(type(value) is type(plain[0]) and value == plain[0] for value in plain):
            return plain[0]
        if name != "mul" or not all(isinstance(value, (int, float)) for value in plain):
            raise NotAlikeError(f"{name} is called with different constants")
        numbers = iter(plain)
        like = next(value for value in each if value is not None)
        scales = tuple(plain[0] if value is None else next(numbers) for value in each)
        stacked = self._attached("scale", torch.tensor(scales, dtype=like.meta["val"].dtype))
        return self._mine(stacked, self._index(tuple(range(len(each))), like), like)

    # Tensors of weights alone

    def is_weight(self, node: fx.Node) -> bool:
        """Whether a value is computed from weights alone."""
        if node not in self._weights:
            self._weights[node] = (
                node.op == "get_attr" and node.target != "training"
                if node.op != "call_function"
                else all(map(self.is_weight, node.all_input_nodes)) and bool(node.all_input_nodes)
            )
        return self._weights[node]

    def _gathered(self, each: Each, filler: float, pads: bool = False) -> fx.Node:
        """Each row's own of several tensors of weights, along a new first axis.

        Args:
            each: the tensor of each graph.
            filler: what stands in place of None.
            pads: whether they may differ in size: smaller ones get zeros behind.
        """
        values = [value for value in each if value is not None]
        if len(set(values)) == 1 and len(values) == len(each):
            return values[0]
        if not all(is_tensor(value) for value in values) or len({v.meta["val"].dim() for v in values}) > 1:
            raise NotAlikeError("tensors of different ranks")
        shapes = [tuple(value.meta["val"].shape) for value in values]
        widest = [max(sizes) for sizes in zip(*shapes, strict=True)]
        if any(list(shape) != widest for shape in shapes) and not pads:
            raise NotAlikeError("tensors of different shapes")
        distinct = list(dict.fromkeys(each))
        like = values[0]
        parts: list[fx.Node] = []
        for value in distinct:
            if value is None:
                part = self.build.call(aten.full_like.default, self._padded(like, widest), filler, like=like)
            else:
                part = self._padded(value, widest)
            parts.append(part)
        stacked = self.build.call(aten.stack.default, parts, 0, like=like)
        return self._mine(stacked, self._index(tuple(map(distinct.index, each)), like), like)

    def _padded(self, value: fx.Node, widest: Sequence[int]) -> fx.Node:
        missing: list[int] = []
        for size, wide in reversed(list(zip(value.meta["val"].shape, widest, strict=True))):
            missing += [0, wide - size]
        return (
            self.build.call(aten.constant_pad_nd.default, value, missing, 0, like=value)
            if any(missing)
            else value
        )

    def _mine(self, stacked: fx.Node, index: fx.Node, like: fx.Node) -> fx.Node:
        """The entry of each row; marked as its own."""
        gathered = self.build.call(aten.index_select.default, stacked, 0, index, like=like)
        self._batched.gathered.add(gathered)
        return gathered

    def _index(self, places: tuple[int, ...], like: fx.Node) -> fx.Node:
        """Which entry of a stack each row takes.

        Args:
            places: of each graph.
            like: where it is from.
        """
        counted = self.build.call(aten.add.Tensor, self.ids, 1, like=like)
        if places == tuple(range(len(places))):
            return counted
        table = self._attached("table", torch.tensor(places))
        return self.build.call(aten.index_select.default, table, 0, counted, like=like)

    def _attached(self, word: str, value: torch.Tensor) -> fx.Node:
        """A constant with an entry for each graph; the same constant once."""
        numbers: Any = value
        key = word, str(value.dtype), *map(float, numbers.tolist())
        if key not in self._constants:
            self._constants[key] = name = f"{CONSTANTS}.{word}_{len(self._constants)}"
            self.build.graph.attach(name, Held(value), trained=False, stored=False)
        return self.build.tensor(self._constants[key])

    # Sums and products

    def _added(self, terms: Sequence[fx.Node]) -> fx.Node | None:
        result: fx.Node | None = None
        for term in terms:
            result = term if result is None else self.build.call(aten.add.Tensor, result, term, like=term)
        return result

    def _plus(self, a: fx.Node, b: fx.Node) -> fx.Node:
        return self._batched.elementwise(aten.add.Tensor, a, b)

    def _times(self, a: fx.Node, b: fx.Node) -> fx.Node:
        return self._batched.elementwise(aten.mul.Tensor, a, b)

    def _without_bias(self, term: fx.Node) -> list[fx.Node]:
        """A linear layer as its product and its bias."""
        if not _has_bias(term):
            return [term]
        product = self.build.call(aten.linear.default, term.args[0], term.args[1], like=term)
        return [product, _node(term.args[2])]


def _has_bias(node: fx.Node) -> bool:
    return node.target is aten.linear.default and len(node.args) > 2 and node.args[2] is not None


def _terms(value: fx.Node, base: fx.Node) -> list[fx.Node]:
    """What a value is a sum of; the base's value is not taken apart."""
    if value is base or value.target is not aten.add.Tensor or value.kwargs:
        return [value]
    left, right = value.args
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return [value]
    if str(left.meta["val"].shape) != str(value.meta["val"].shape):
        return [value]
    return [*_terms(left, base), *_terms(right, base)]


def _node(value: object) -> fx.Node:
    if not isinstance(value, fx.Node):
        raise NotAlikeError(f"{value!r} is no value")
    return value


def structure(value: fx.Node, shared: Collection[fx.Node]) -> Any:
    """The operations that a value is computed by, from shared values and tensors of weights."""
    if value in shared:
        return value
    if value.op != "call_function":
        return "a weight"
    return value.target, tuple(structure(operand, shared) for operand in value.all_input_nodes)
