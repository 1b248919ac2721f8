"""Matrix products: the operations that multiply matrices, how each reads its operands, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from adaptc.ir.nodes import operation

Shape = Sequence[int]


@dataclass(frozen=True)
class Reading:
    """How a weight reads as matrices `(out, in)`.

    Attributes:
        out: the axis of the weight that holds the rows.
        inner: the axis that holds the columns; None where every other axis does. Axes left over are batches.
        features: the axis of the result that holds what the rows give.
    """

    out: int
    inner: int | None = None
    features: int = -1


@dataclass(frozen=True)
class MatrixProduct:
    """One operation that multiplies matrices.

    Attributes:
        operands: the positions of the arguments that are multiplied, an input and a weight where there are such.
        flops: shapes of the result and of the two operands -> multiplications and additions.
        weights: position of an argument -> how a weight there reads; empty where a weight cannot be adapted.
        bias: the position of the argument that is added to the result.
    """

    operands: tuple[int, int]
    flops: Callable[[Shape, Shape, Shape], int]
    weights: Mapping[int, Reading] = field(default_factory=dict)
    bias: int | None = None


def _inner_product(result: Shape, left: Shape, right: Shape) -> int:
    """Each number of the result is a sum over the last axis of the left operand."""
    return 2 * math.prod(result) * left[-1]


def _convolution(result: Shape, x: Shape, weight: Shape) -> int:
    """Each number of the result is a sum over one kernel `(in / groups, *places)`."""
    return 2 * math.prod(result) * math.prod(weight[1:])


def _transposed_convolution(result: Shape, x: Shape, weight: Shape) -> int:
    """Each number of the input is multiplied with one kernel `(out / groups, *places)` and added to the result."""
    return 2 * math.prod(x) * math.prod(weight[1:])


def _lookup(result: Shape, ids: Shape, weight: Shape) -> int:
    """Rows are copied: nothing is multiplied."""
    return 0


def _attention(result: Shape, query: Shape, key: Shape) -> int:
    """Two products: the query with every key, the scores with every value."""
    return 2 * key[-2] * (math.prod(query) + math.prod(result))


def _matmul(left: int) -> MatrixProduct:
    """`x @ W` or `W @ x`, the left operand at this position."""
    right = left + 1
    weights = {left: Reading(out=-2, inner=-1, features=-2), right: Reading(out=-1, inner=-2)}
    return MatrixProduct((left, right), _inner_product, weights)


_GROUPED = MatrixProduct((0, 1), _inner_product, {1: Reading(out=-1, inner=-2)})
MATRIX_PRODUCTS: Mapping[str, MatrixProduct] = {
    "linear": MatrixProduct((0, 1), _inner_product, {1: Reading(out=0)}, bias=2),
    # a bias (out,) stands beside (in, out): the weight is the right operand
    "addmm": MatrixProduct((1, 2), _inner_product, {2: Reading(out=-1, inner=-2)}, bias=0),
    "mm": _matmul(0),
    "matmul": _matmul(0),
    "bmm": _matmul(0),
    # what baddbmm adds is a mask or a bias of several matrices, never a vector (out,)
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
    # a product with one-hot rows
    "embedding": MatrixProduct((1, 0), _lookup, {0: Reading(out=1)}),
    # these weights are stored in few bits: nothing is adapted here, and the base's own node said how it reads
    "quantized_linear": MatrixProduct((0, 1), _inner_product),
    "quantized_embedding": MatrixProduct((0, 1), _lookup),
    # multiplies activations with activations
    "scaled_dot_product_attention": MatrixProduct((0, 1), _attention),
    # its operands are in a list, and its equation says the rest: see `matrix_axes` and `flops_of`
    "einsum": MatrixProduct((0, 1), _inner_product),
}
"""Operation -> how it multiplies; a new spelling of a product is one row.

They mix features: what lies upstream of one of them belongs to another layer. Recurrent layers (`lstm`, `gru`) have no
row: each is many products with several weights in one operation, none of which is a site.
"""


def operands_of(node: fx.Node) -> tuple[Any, ...]:
    """The arguments that a matrix product multiplies: two; of an einsum as many as it has."""
    if operation(node) == "einsum":
        return tuple(node.args[1])  # type: ignore[arg-type]
    left, right = MATRIX_PRODUCTS[operation(node)].operands
    return node.args[left], node.args[right]


def bias_of(node: fx.Node) -> Any:
    """The argument that is added to a matrix product's result; None if there is none."""
    product = MATRIX_PRODUCTS.get(operation(node))
    place = product.bias if product is not None else None
    return node.args[place] if place is not None and len(node.args) > place else None


def matrix_axes(node: fx.Node, weight: fx.Node, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Which axes of an operand with this many are the rows, and which the columns, of the matrices that it is.

    Returns:
        `(out, inner)`, axes counted from the front; None if this is no product with the operand as a weight.
    """
    if operation(node) == "einsum":
        letters = _einsum_letters(node, weight)
        return (letters[0], letters[1]) if letters is not None else None
    reading = _reading(node, weight)
    if reading is None or rank < 2:
        return None
    out = reading.out % rank
    every = tuple(axis for axis in range(rank) if axis != out)
    return (out,), every if reading.inner is None else (reading.inner % rank,)


def feature_axes(node: fx.Node, weight: fx.Node, rank: int) -> tuple[int, ...]:
    """Which of the axes of a product's result hold what the rows of the weight give, in the order of the rows."""
    if operation(node) == "einsum":
        letters = _einsum_letters(node, weight)
        return letters[2] if letters is not None else (rank - 1,)
    reading = _reading(node, weight)
    return ((reading.features if reading is not None else -1) % rank,)


def _reading(node: fx.Node, weight: fx.Node) -> Reading | None:
    product = MATRIX_PRODUCTS.get(operation(node))
    places = [place for place, argument in enumerate(node.args) if argument is weight]
    return product.weights.get(places[0]) if product is not None and len(places) == 1 else None


def flops_of(node: fx.Node, shape: Callable[[fx.Node], Shape]) -> int:
    """Multiplications and additions of a node; 0 if it is no matrix product. What adds a bias is not counted.

    Args:
        node: of any operation.
        shape: gives the shape of a node's value, in numbers.
    """
    product = MATRIX_PRODUCTS.get(operation(node)) if node.op == "call_function" else None
    if product is None:
        return 0
    shapes = [shape(operand) if isinstance(operand, fx.Node) else () for operand in operands_of(node)]
    if operation(node) == "einsum":
        return _einsum_flops(str(node.args[0]), shapes)
    return product.flops(shape(node), *shapes)


def _einsum_terms(equation: str) -> tuple[list[str], str]:
    """The letters of each operand, and of the result."""
    given, arrow, result = equation.replace(" ", "").partition("->")
    if not arrow:  # letters of a single operand stay, in the order of the alphabet
        letters = given.replace(",", "").replace("...", "")
        result = "..." * ("..." in given) + "".join(sorted(c for c in letters if letters.count(c) == 1))
    return given.split(","), result


def _einsum_letters(
    node: fx.Node, weight: fx.Node
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None:
    """Letters summed over are columns, letters of the weight alone are rows; shared ones that stay are batches.

    Returns:
        axes of the weight that are rows, those that are columns, and where the rows stand in the result; None if the
        equation says nothing of the kind.
    """
    terms, result = _einsum_terms(str(node.args[0]))
    operands = operands_of(node)
    if len(terms) != 2 or not result or "..." in "".join(terms) or operands.count(weight) != 1:
        return None
    own, other = terms[operands.index(weight)], terms[1 - operands.index(weight)]
    inner = tuple(own.index(c) for c in own if c in other and c not in result)
    rows = [c for c in own if c not in other and c in result]
    if not inner or not rows:
        return None
    return tuple(own.index(c) for c in rows), inner, tuple(result.index(c) for c in rows)


def _einsum_flops(equation: str, shapes: Sequence[Shape]) -> int:
    """Operands are multiplied from left to right, as torch does; letters of one operand alone are summed before."""
    terms, result = _einsum_terms(equation)
    sizes: dict[str, int] = {}
    axes = [_einsum_axes(term, len(shape)) for term, shape in zip(terms, shapes, strict=True)]
    for names, shape in zip(axes, shapes, strict=True):
        for name, size in zip(names, shape, strict=True):
            sizes[name] = max(size, sizes.get(name, 1))
    stay = {name for name in sizes if name in result or (len(name) > 1 and "..." in result)}
    total, product = 0, set(axes[0])
    for index, names in enumerate(axes[1:], start=1):
        later = stay.union(*axes[index + 1 :])
        multiplied = {n for n in product | set(names) if n in later or (n in product and n in names)}
        total += 2 * math.prod(sizes[name] for name in multiplied)
        product = multiplied & later
    return total


def _einsum_axes(term: str, rank: int) -> list[str]:
    """A name for each axis of an operand: its letter, or `...1` for the last of those that dots stand for."""
    first, dots, last = term.partition("...")
    count = rank - len(first) - len(last) if dots else 0
    return [*first, *(f"...{count - i}" for i in range(count)), *last]
