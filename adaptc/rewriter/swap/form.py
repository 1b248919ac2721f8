"""The form of an adapter that a program can take as inputs: scales and a product, whatever the method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class NoFormError(Exception):
    """A method makes something else of a site than a program can take as inputs; the message says what.

    Args:
        message: what it is.
        entry: the number of the spec's entry, where it is known.
    """

    def __init__(self, message: str, entry: int = 0):
        super().__init__(message)
        self.entry = entry


@dataclass(frozen=True, eq=False)
class Product:
    """`left @ right`, not multiplied out: left `(out, r)`, right `(r, in)`."""

    left: Tensor
    right: Tensor

    @property
    def t(self) -> Product:
        """Its transpose."""
        return Product(self.right.T, self.left.T)

    def scaled_rows(self, scale: Tensor) -> Product:
        """`diag(scale) left right`."""
        return Product(scale.unsqueeze(1) * self.left, self.right)

    def scaled_columns(self, scale: Tensor) -> Product:
        """`left right diag(scale)`."""
        return Product(self.left, self.right * scale)

    def dense(self) -> Tensor:
        """The product multiplied out `(out, in)`."""
        return self.left @ self.right


@dataclass(frozen=True, eq=False)
class Form:
    """`W' = diag(rows) W diag(columns) + Σ left right`; None stands for scales of one.

    Attributes:
        rows: `(out,)`.
        columns: `(in,)`.
        products: the products.
    """

    rows: Tensor | None = None
    columns: Tensor | None = None
    products: tuple[Product, ...] = ()

    @property
    def t(self) -> Form:
        """The form of the transposed weight."""
        return Form(self.columns, self.rows, tuple(product.t for product in self.products))

    def plus(self, product: Product) -> Form:
        """The form with a product more."""
        return Form(self.rows, self.columns, (*self.products, product))

    def scaled_rows(self, scale: Tensor) -> Form:
        """`diag(scale) W'`."""
        products = tuple(product.scaled_rows(scale) for product in self.products)
        return Form(_times(self.rows, scale), self.columns, products)

    def scaled_columns(self, scale: Tensor) -> Form:
        """`W' diag(scale)`."""
        products = tuple(product.scaled_columns(scale) for product in self.products)
        return Form(self.rows, _times(self.columns, scale), products)

    def then(self, later: Form) -> Form:
        """The form of a method after another: W' of this one in place of W in the later one."""
        form = self if later.rows is None else self.scaled_rows(later.rows)
        form = form if later.columns is None else form.scaled_columns(later.columns)
        return Form(form.rows, form.columns, (*form.products, *later.products))

    def of_rows(self, ranges: Sequence[tuple[int, int]], out: int) -> Form:
        """The form of the whole weight `(out, in)`, of which this one is of some rows.

        Raises:
            NoFormError: it scales columns, which a whole weight has in its other rows too.
        """
        if self.columns is not None:
            raise NoFormError("it scales the inputs of some rows of a weight alone")
        products = tuple(Product(_spread(p.left, ranges, out, 0.0), p.right) for p in self.products)
        rows = None if self.rows is None else _spread(self.rows, ranges, out, 1.0)
        return Form(rows, None, products)

    def applied(self, W: Tensor) -> Tensor:
        """W' `(out, in)` of W."""
        value = W if self.rows is None else self.rows.unsqueeze(1) * W
        value = value if self.columns is None else value * self.columns
        for product in self.products:
            value = value + product.dense()
        return value

    @property
    def product(self) -> Product | None:
        """All products as one; None where there is none."""
        import torch

        if not self.products:
            return None
        lefts, rights = [p.left for p in self.products], [p.right for p in self.products]
        return Product(torch.cat(lefts, 1), torch.cat(rights, 0))


def _times(scale: Tensor | None, further: Tensor) -> Tensor:
    return further if scale is None else scale * further


def _spread(part: Tensor, ranges: Sequence[tuple[int, int]], out: int, filler: float) -> Tensor:
    """A tensor with `out` rows: those of `part` in these ranges, and `filler` elsewhere."""
    whole = part.new_full((out, *part.shape[1:]), filler)
    offset = 0
    for start, stop in ranges:
        whole[start:stop] = part[offset : offset + stop - start]
        offset += stop - start
    return whole
