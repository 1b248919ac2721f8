"""The table of matrix products: which operations multiply matrices, how each reads its operands, and its FLOPs.

`affine_maps` is about those of them that can be written again with another weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from adaptc.ir.nodes import list_arg, node_arg, operation

Shape = Sequence[int]


@dataclass(frozen=True)
class Reading:
    """How a weight reads as matrices `(out, in)`.

    Attributes:
        out: the axis of the weight that is the rows.
        inner: the axis that is the columns; None if all other axes are. Axes that are neither are batches.
        features: the axis of the result that is the output features, one for each row.
    """

    out: int
    inner: int | None = None
    features: int = -1


@dataclass(frozen=True)
class MatrixProduct:
    """One operation that multiplies matrices.

    Attributes:
        operands: the positions of the two arguments that are multiplied; the weight, if there is one, is the second.
        flops: shapes of the result and of the two operands -> number of multiplications and additions.
        weights: position of an argument -> how a weight there reads; empty if a weight there cannot be adapted.
        bias: the position of the argument that is added to the result; None if there is none.
    """

    operands: tuple[int, int]
    flops: Callable[[Shape, Shape, Shape], int]
    weights: Mapping[int, Reading] = field(default_factory=dict[int, Reading])
    bias: int | None = None


def _inner_product(result: Shape, left: Shape, right: Shape) -> int:
    """FLOPs where each entry of the result is a sum over the last axis of the left operand."""
    return 2 * math.prod(result) * left[-1]


def _convolution(result: Shape, x: Shape, weight: Shape) -> int:
    """FLOPs where each entry of the result is a sum over one kernel `(in / groups, *size)`."""
    return 2 * math.prod(result) * math.prod(weight[1:])


def _transposed_convolution(result: Shape, x: Shape, weight: Shape) -> int:
    """FLOPs where each entry of the input is multiplied by one kernel `(out / groups, *size)` and added up."""
    return 2 * math.prod(x) * math.prod(weight[1:])


def _lookup(result: Shape, ids: Shape, weight: Shape) -> int:
    """No FLOPs: rows are copied."""
    return 0


def _attention(result: Shape, query: Shape, key: Shape) -> int:
    """FLOPs of two products: the query with every key, the scores with every value."""
    return 2 * key[-2] * (math.prod(query) + math.prod(result))


def _matmul(left: int) -> MatrixProduct:
    """The row of `x @ W` or `W @ x` whose left operand is at this position."""
    right = left + 1
    weights = {left: Reading(out=-2, inner=-1, features=-2), right: Reading(out=-1, inner=-2)}
    return MatrixProduct((left, right), _inner_product, weights)


_GROUPED = MatrixProduct((0, 1), _inner_product, {1: Reading(out=-1, inner=-2)})
MATRIX_PRODUCTS: Mapping[str, MatrixProduct] = {
    "linear": MatrixProduct((0, 1), _inner_product, {1: Reading(out=0)}, bias=2),
    # its bias is (out,), so that the weight is the right operand (in, out)
    "addmm": MatrixProduct((1, 2), _inner_product, {2: Reading(out=-1, inner=-2)}, bias=0),
    "mm": _matmul(0),
    "matmul": _matmul(0),
    "bmm": _matmul(0),
    # no bias: what it adds is a mask or a batch of matrices, never a vector (out,)
    "baddbmm": _matmul(1),
    "_grouped_mm": _GROUPED,
    "grouped_mm_fallback": _GROUPED,
    **{
        f"conv{n}d": MatrixProduct((0, 1), _convolution, {1: Reading(out=0, features=1)}, bias=2)
        for n in (1, 2, 3)
    },
    **{
        f"conv_transpose{n}d": MatrixProduct(
            (0, 1), _transposed_convolution, {1: Reading(out=1, features=1)}, bias=2
        )
        for n in (1, 2, 3)
    },
    # also transposed ones, as its seventh argument says: no weight is adapted here, as `conv2d` and the like are usual
    "convolution": MatrixProduct((0, 1), _convolution, bias=2),
    # a matrix product with one-hot rows
    "embedding": MatrixProduct((1, 0), _lookup, {0: Reading(out=1)}),
    # the weight is quantized: nothing is adapted here, and the node of the base says how it reads
    "quantized_linear": MatrixProduct((0, 1), _inner_product),
    "quantized_embedding": MatrixProduct((0, 1), _lookup),
    # multiplies activations with activations
    "scaled_dot_product_attention": MatrixProduct((0, 1), _attention),
    # its operands are in a list, and its equation tells the axes: see `matrix_axes` and `flops_of`
    "einsum": MatrixProduct((0, 1), _inner_product),
}
"""Name of an operation -> how it multiplies. A new spelling of a matrix product is one row.

These operations mix features: what lies upstream of one belongs to another layer. Recurrent layers have no row: each is
many matrix products with several weights in one operation, none of which is a site. See `RECURRENT`.
"""
RECURRENT = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})
"""The operations that are a recurrent layer, or several."""


def operands_of(node: fx.Node) -> tuple[Any, ...]:
    """The arguments that a matrix product multiplies: two, or all operands of an einsum."""
    if operation(node) == "einsum":
        return tuple(list_arg(node, 1))
    left, right = MATRIX_PRODUCTS[operation(node)].operands
    return node.args[left], node.args[right]


def bias_of(node: fx.Node) -> Any:
    """The argument that is added to a matrix product's result; None if there is none."""
    product = MATRIX_PRODUCTS.get(operation(node))
    position = product.bias if product is not None else None
    return node.args[position] if position is not None and len(node.args) > position else None


def matrix_axes(node: fx.Node, weight: fx.Node, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Which axes of a weight are the rows, and which the columns, of the matrices that an operation multiplies by.

    Args:
        node: the operation.
        weight: the operand that is the weight.
        rank: its number of axes.

    Returns:
        the axes of the rows and the axes of the columns, counted from the front; None if the operation is no matrix
        product with this operand as its weight.
    """
    if operation(node) == "einsum":
        letters = _einsum_letters(node, weight)
        return (letters[0], letters[1]) if letters is not None else None
    reading = _reading(node, weight)
    if reading is None or rank < 2:
        return None
    out = reading.out % rank
    others = tuple(axis for axis in range(rank) if axis != out)
    return (out,), others if reading.inner is None else (reading.inner % rank,)


def feature_axes(node: fx.Node, weight: fx.Node, rank: int) -> tuple[int, ...]:
    """Which axes of a matrix product's result are its output features, in the order of the weight's rows.

    Args:
        node: the matrix product.
        weight: the operand that is the weight.
        rank: the number of axes of the result.
    """
    if operation(node) == "einsum":
        letters = _einsum_letters(node, weight)
        return letters[2] if letters is not None else (rank - 1,)
    reading = _reading(node, weight)
    return ((reading.features if reading is not None else -1) % rank,)


def _reading(node: fx.Node, weight: fx.Node) -> Reading | None:
    """How a matrix product reads this operand as its weight; None if it does not, or reads it twice."""
    product = MATRIX_PRODUCTS.get(operation(node))
    positions = [position for position, argument in enumerate(node.args) if argument is weight]
    return product.weights.get(positions[0]) if product is not None and len(positions) == 1 else None


def flops_of(node: fx.Node, shape: Callable[[fx.Node], Shape]) -> int:
    """The number of multiplications and additions of a matrix product, without those of a bias; else 0.

    Args:
        node: any node.
        shape: gives the shape of a node's value, in numbers.
    """
    if node.op == "call_function" and operation(node) in RECURRENT:
        return _recurrent_flops(node, shape)
    product = MATRIX_PRODUCTS.get(operation(node)) if node.op == "call_function" else None
    if product is None:
        return 0
    shapes = [shape(operand) if isinstance(operand, fx.Node) else () for operand in operands_of(node)]
    if operation(node) == "einsum":
        return _einsum_flops(str(node.args[0]), shapes)
    if operation(node) == "convolution" and node.args[6] is True:
        return _transposed_convolution(shape(node), *shapes)
    return product.flops(shape(node), *shapes)


def _recurrent_flops(node: fx.Node, shape: Callable[[fx.Node], Shape]) -> int:
    """FLOPs of recurrent layers: every matrix among their weights multiplies one vector at each step of each row."""
    packed = str(node.target).endswith(".data")
    x, weights = node_arg(node, 0), list_arg(node, 3 if packed else 2)
    matrices = [dims for dims in map(shape, weights) if len(dims) == 2]
    return 2 * math.prod(shape(x)[:-1]) * sum(map(math.prod, matrices))


def _einsum_terms(equation: str) -> tuple[list[str], str]:
    """The letters of an equation.

    Returns:
        those of each operand, and those of the result.
    """
    operands, arrow, result = equation.replace(" ", "").partition("->")
    if not arrow:  # then the result has the letters that occur once, in the order of the alphabet
        letters = operands.replace(",", "").replace("...", "")
        result = "..." * ("..." in operands) + "".join(sorted(c for c in letters if letters.count(c) == 1))
    return operands.split(","), result


def _einsum_letters(
    node: fx.Node, weight: fx.Node
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None:
    """The axes of a weight in an einsum: letters that are summed are columns, letters of the weight alone are rows.

    Letters that both operands and the result have are batches.

    Returns:
        the axes of the rows, the axes of the columns, and the axes of the result that the rows are; None if the
        equation is no such product of two operands.
    """
    terms, result = _einsum_terms(str(node.args[0]))
    operands = operands_of(node)
    if len(terms) != 2 or not result or "..." in "".join(terms) or operands.count(weight) != 1:
        return None
    letters, others = terms[operands.index(weight)], terms[1 - operands.index(weight)]
    inner = tuple(letters.index(c) for c in letters if c in others and c not in result)
    rows = [c for c in letters if c not in others and c in result]
    if not inner or not rows:
        return None
    return tuple(letters.index(c) for c in rows), inner, tuple(result.index(c) for c in rows)


def _einsum_flops(equation: str, shapes: Sequence[Shape]) -> int:
    """FLOPs if operands are multiplied from left to right, as torch does; sums over one operand alone are free."""
    terms, result = _einsum_terms(equation)
    sizes: dict[str, int] = {}
    axes = [_einsum_axes(term, len(shape)) for term, shape in zip(terms, shapes, strict=True)]
    for names, shape in zip(axes, shapes, strict=True):
        for name, size in zip(names, shape, strict=True):
            sizes[name] = max(size, sizes.get(name, 1))
    results = {name for name in sizes if name in result or (len(name) > 1 and "..." in result)}
    total, product = 0, set(axes[0])
    for index, names in enumerate(axes[1:], start=1):
        later = results.union(*axes[index + 1 :])
        multiplied = {n for n in product | set(names) if n in later or (n in product and n in names)}
        total += 2 * math.prod(sizes[name] for name in multiplied)
        product = multiplied & later
    return total


def product_terms(node: fx.Node) -> tuple[list[tuple[fx.Node, str]], str] | None:
    """A matrix product as an einsum: a letter for each axis.

    Returns:
        each operand that is a node with its letters, and the letters of the result; None if the node is no product of
        matrices, or one whose axes are not plain, such as a convolution.
    """
    name = operation(node)
    if name == "einsum":
        terms, result = _einsum_terms(str(node.args[0]))
        ranks = [operand.meta["val"].dim() for operand in operands_of(node)]
        longest = max(rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=True))
        named = [
            _spelled(term, rank - len(term.replace("...", "")))
            for term, rank in zip(terms, ranks, strict=True)
        ]
        return list(zip(operands_of(node), named, strict=True)), _spelled(result, longest)
    if name not in ("linear", "quantized_linear", "addmm", "mm", "matmul", "bmm", "baddbmm"):
        return None
    left, right = operands_of(node)
    batch = node.meta["val"].dim()
    if name in ("linear", "quantized_linear"):
        rows = _BATCH[-(batch - 1) :] if batch > 1 else ""
        weight = [(right, "oi")] if isinstance(right, fx.Node) else []
        return [(left, rows + "i"), *weight], rows + "o"
    ranks = left.meta["val"].dim(), right.meta["val"].dim()
    shared = max(*ranks, 2) - 2
    first = (_BATCH[-shared:] + "mi")[-ranks[0] :] if ranks[0] > 1 and shared else "mi"[-ranks[0] :]
    second = (
        (_BATCH[-shared:] + "io")[-ranks[1] :] if shared and ranks[1] > 1 else ("io" if ranks[1] > 1 else "i")
    )
    result = _BATCH[-shared:] * bool(shared) + "m" * (ranks[0] > 1) + "o" * (ranks[1] > 1)
    added = node.args[0] if name in ("addmm", "baddbmm") else None
    extra = [(added, result[-added.meta["val"].dim() :])] if isinstance(added, fx.Node) else []
    return [(left, first), (right, second), *extra], result


_BATCH = "ABCDEFGH"
"""Letters for the axes that the operands of a product share, the last for the last of them."""


def _spelled(term: str, dots: int) -> str:
    """A term of an einsum whose ellipsis is written out, for this number of axes."""
    return term.replace("...", _BATCH[-dots:] if dots else "")


def _einsum_axes(term: str, rank: int) -> list[str]:
    """A name for each axis of an operand: its letter; from last to first `...1`, `...2` for those of an ellipsis."""
    first, dots, last = term.partition("...")
    count = rank - len(first) - len(last) if dots else 0
    return [*first, *(f"...{count - i}" for i in range(count)), *last]
