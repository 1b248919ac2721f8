"""How far two outputs are apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch

MASKED = 1e3
"""How many times larger than all other values a constant must be to count as a mask, such as `finfo.min`. Chosen far
above the spread of a model's outputs."""
LEAST = 1e-12
"""The least scale of an output, so that one of zeros can be divided by it."""


@dataclass(frozen=True)
class Difference:
    """How far an output is from what is expected.

    Attributes:
        absolute: the largest difference of two numbers; infinite where the dtypes are of other kinds, where the shapes
            differ, as of a selection by values, or where one is finite and the other is not. 0 for whole numbers and
            booleans.
        relative: the same over the largest expected value.
        undefined: some expected values are NaN; these are not compared.
        unequal: how many whole numbers or booleans differ.
    """

    absolute: float = 0.0
    relative: float = 0.0
    undefined: bool = False
    unequal: int = 0


def difference(expected: torch.Tensor, got: torch.Tensor) -> Difference:
    """How far `got` is from `expected`; whole numbers and booleans are equal or not."""
    a, b = expected.detach(), got.detach()
    kinds = a.is_complex() != b.is_complex() or a.is_floating_point() != b.is_floating_point()
    if kinds or a.shape != b.shape:
        return Difference(float("inf"), float("inf"))
    if is_label(a):
        return Difference(unequal=int((a != b).sum()))
    a, b = (torch.view_as_real(t) if t.is_complex() else t for t in (a, b))
    a, b = a.double().flatten(), b.double().flatten()
    defined = ~a.isnan()
    undefined = not bool(defined.all())
    a, b = a[defined], b[defined]
    finite = torch.isfinite(a)
    if not torch.equal(a[~finite], b[~finite]) or not torch.isfinite(b[finite]).all():
        return Difference(float("inf"), float("inf"), undefined)
    a, b = a[finite], b[finite]
    if not len(a):
        return Difference(undefined=undefined)
    absolute = float((a - b).abs().max())
    return Difference(absolute, absolute / max(scale(a[~_masked(a) | (a != b)]), LEAST), undefined)


def is_label(value: torch.Tensor) -> bool:
    """Whether an output holds whole numbers or booleans."""
    return not (value.is_floating_point() or value.is_complex())


def scale(values: torch.Tensor) -> float:
    """The largest absolute value that is finite and no mask; 0 if there is none."""
    finite = values[torch.isfinite(values)]
    unmasked = finite[~_masked(finite)]
    return float(unmasked.abs().max()) if len(unmasked) else 0.0


def _masked(values: torch.Tensor) -> torch.Tensor:
    """Where the smallest value is, if it is `MASKED` times larger than all others: `masked_fill(..., finfo.min)`."""
    if not len(values):
        return torch.zeros_like(values, dtype=torch.bool)
    smallest = values == values.min()
    rest = values[~smallest]
    far = len(rest) > 0 and float(values.min().abs()) > MASKED * float(rest.abs().max()) > 0
    return smallest if far else torch.zeros_like(smallest)
