"""A method's own expression read as scales and products: it is run on a weight that stands for any weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from adaptc.ir.nodes import map_operands, node_arg, operation
from adaptc.rewriter.swap.form import Form, NoFormError, Product

Value = Any
"""A `Form`, a `Product`, a tensor or a plain number: each operation asks which."""
Dense = Callable[[], torch.Tensor]
"""Gives the weight that the expression starts from, `(out, in)`, for methods that read its numbers. Raises NoFormError
where it is not there."""
SAME = frozenset({"clone", "detach", "alias", "contiguous", "to", "_to_copy", "lift_fresh_copy"})
"""Operations that give the value of their operand."""
TRANSPOSES = frozenset({"t", "numpy_T", "mT"})


def form_of(
    expression: fx.Graph, theta: Mapping[str, torch.Tensor], shape: tuple[int, int], dense: Dense
) -> Form:
    """The form of a weight's expression.

    Sums, scales of rows and columns, and products of two matrices without the weight are followed; anything else is
    computed on dense tensors.

    Args:
        expression: a graph whose first input is the weight `(out, in)`; the others are `theta` in order.
        theta: the method's tensors, as the expression takes them, in float64 or fake.
        shape: (out, in).
        dense: gives the weight.

    Raises:
        NoFormError: the result is neither scales of the weight nor a sum of such and thin products.
    """
    values: dict[fx.Node, Value] = {}
    inputs: list[Value] = [Form(), *theta.values()]
    reader = _Reader(shape, dense)
    for node in expression.nodes:
        if node.op == "placeholder":
            values[node] = inputs.pop(0)
        elif node.op == "get_attr":
            values[node] = getattr(expression.owning_module, str(node.target))
        elif node.op == "call_function":
            values[node] = reader.run(node, *map_operands(node, values.__getitem__))
        else:
            return reader.result(values[node_arg(node, 0)])
    raise AssertionError("a graph ends with an output")


class _Reader:
    """Runs operations on forms and products where it can, and on dense tensors where it must.

    Args:
        shape: (out, in) of the weight.
        dense: gives the weight.
    """

    def __init__(self, shape: tuple[int, int], dense: Dense):
        self.shape, self._weight = shape, dense
        self._reads = ""

    def run(self, node: fx.Node, args: Any, kwargs: Any) -> Value:
        """The value of one operation."""
        name = operation(node)
        followed = self._followed(name, args, kwargs)
        if followed is not None:
            return followed
        operands = pytree.tree_leaves((args, kwargs))
        if any(isinstance(value, Form) for value in operands):
            self._reads = name
        target: Any = node.target
        args, kwargs = pytree.tree_map(self._plain, (args, kwargs))
        return target(*args, **kwargs)

    def result(self, value: Value) -> Form:
        """The form of a result.

        Raises:
            NoFormError: it is a dense matrix.
        """
        if isinstance(value, Form):
            return value
        if self._reads:
            raise NoFormError(f"it computes new weights from the base's ({self._reads})")
        raise NoFormError("it puts other weights in place of the base's")

    def _followed(self, name: str, args: Any, kwargs: Any) -> Value | None:
        """The value of an operation that is followed; None for any other."""
        symbolic = [value for value in args if isinstance(value, Form | Product)]
        if name == "getattr" and args[1] == "device":
            return torch.device("cpu")
        if name in SAME and symbolic:
            return args[0]
        if name in TRANSPOSES and symbolic:
            return args[0].t
        if name in ("mm", "matmul") and not symbolic and all(_is_matrix(value) for value in args):
            return Product(args[0], args[1])
        if name in ("mm", "matmul") and not any(isinstance(value, Form) for value in args):
            return self._multiplied(args[0], args[1])
        if name in ("add", "sub") and symbolic:
            factor = kwargs.get("alpha", 1) * (-1 if name == "sub" else 1)
            return self._sum(args[0], args[1] if factor == 1 else self._scaled(args[1], factor))
        if name == "neg" and symbolic:
            return self._scaled(args[0], -1)
        if name == "mul" and len(symbolic) == 1:
            matrix, scale = args if isinstance(args[0], Form | Product) else args[::-1]
            return self._scaled(matrix, scale)
        if name == "div" and symbolic and not isinstance(args[1], Form | Product):
            inverse = 1 / args[1]
            return self._scaled(args[0], inverse)
        return None

    def _multiplied(self, left: Value, right: Value) -> Value:
        """A product of a product and a matrix, which is thin too."""
        if isinstance(left, Product) and isinstance(right, torch.Tensor) and right.dim() == 2:
            return Product(left.left, left.right @ right)
        if isinstance(right, Product) and isinstance(left, torch.Tensor) and left.dim() == 2:
            return Product(left @ right.left, right.right)
        return None

    def _sum(self, a: Value, b: Value) -> Value | None:
        """A form plus products; None for any other sum."""
        if isinstance(b, Form):
            a, b = b, a
        if isinstance(a, Form) and isinstance(b, Product):
            return a.plus(b)
        if isinstance(a, Product) and isinstance(b, Product):
            return Product(torch.cat([a.left, b.left], 1), torch.cat([a.right, b.right], 0))
        if isinstance(a, Form) and not isinstance(b, Form):
            raise NoFormError("what it adds to a weight is no product of thin matrices")
        return None

    def _scaled(self, matrix: Value, scale: Value) -> Value | None:
        """A form or product times a number, or a vector along its rows or columns; None for any other scale."""
        if isinstance(scale, Form | Product) or not isinstance(matrix, Form | Product):
            return matrix * scale if not isinstance(matrix, Form | Product) else None
        out, inner = self._sides(matrix)
        size = tuple(scale.shape) if isinstance(scale, torch.Tensor) else ()
        if size in ((), (1,), (1, 1)):
            if isinstance(matrix, Product):
                return Product(matrix.left * scale, matrix.right)
            whole = torch.ones(out, dtype=torch.float64) * scale
            return matrix.scaled_rows(whole.reshape(-1))
        if size == (out, 1):
            return matrix.scaled_rows(scale.reshape(-1))
        if size in ((1, inner), (inner,)):
            return matrix.scaled_columns(scale.reshape(-1))
        return None

    def _sides(self, matrix: Form | Product) -> tuple[int, int]:
        if isinstance(matrix, Product):
            return matrix.left.shape[0], matrix.right.shape[1]
        return self.shape

    def _plain(self, value: Value) -> Value:
        """A value as torch computes with it; a form as a dense weight."""
        if isinstance(value, Form):
            return value.applied(self._weight())
        return value.dense() if isinstance(value, Product) else value


def _is_matrix(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 2
