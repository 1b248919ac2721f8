"""Random values like those of an example: of their range, their order and their kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch

from adaptc.inputs import ASCENDING, DESCENDING, IGNORED, InputSpec, Values

FEW = 4
"""An example of floats needs more numbers than this to be taken for a mask by its having two values only."""
STEPS = 3
"""Fewer steps than these are in order by chance."""
SPREAD = 0.5
"""Around one value alone, random ones differ from it by up to this share of it."""


def values_of(name: str, examples: Sequence[torch.Tensor]) -> Values | None:
    """What the values of an input's examples are like; None where they have no finite value, or are complex.

    Args:
        name: of the input: one called a mask has two values though its examples may show only one.
        examples: of one dtype.
    """
    rows = [row for example in examples for row in _rows(example)]
    if not rows or rows[0].is_complex():
        return None
    flat = torch.cat(rows).double()
    labels = not rows[0].is_floating_point() and bool((flat != IGNORED).any())
    finite = flat[torch.isfinite(flat) & ~((flat == IGNORED) & torch.tensor(labels))]
    if not len(finite):
        return None
    order, strict = _order(rows)
    pair = _pair(name, rows, flat)
    if pair is not None and not order and bool((flat == flat[0]).all()):
        order = ASCENDING if pair[0] < pair[1] else DESCENDING  # the value that fills whole rows comes first
    low, high = float(finite.min()), float(finite.max())
    return Values(
        low,
        high,
        float(finite.mean()),
        float(finite.std(correction=0)),
        whole=bool((finite == finite.round()).all()),
        order=order,
        strict=strict,
        pair=pair,
    )


def _rows(example: torch.Tensor) -> list[torch.Tensor]:
    """The rows of a tensor along its last dimension; none of an empty one."""
    if not example.numel():
        return []
    return list(example.detach().cpu().reshape(-1, example.shape[-1] if example.dim() else 1))


def _order(rows: Sequence[torch.Tensor]) -> tuple[str, bool]:
    """The order that all rows have, and whether no value is in a row twice; ("", False) for rows of one value."""
    steps = torch.cat([row[1:].double() - row[:-1].double() for row in rows])
    if not (steps != 0).any() or len(steps) < STEPS:
        return "", False
    if bool((steps >= 0).all()):
        return ASCENDING, bool((steps > 0).all())
    if bool((steps <= 0).all()):
        return DESCENDING, bool((steps < 0).all())
    return "", False


def _pair(name: str, rows: Sequence[torch.Tensor], flat: torch.Tensor) -> tuple[float, float] | None:
    """The two values of a mask; None where these are no mask."""
    values: list[float] = cast(Any, flat).unique().tolist()
    boolean = rows[0].dtype == torch.bool
    if len(values) == 1 and (boolean or ("mask" in name and values[0] in (0.0, 1.0))):
        return values[0], 1.0 - values[0]
    if len(values) != 2 or (rows[0].is_floating_point() and len(flat) <= FEW):
        return None
    whole = [float(row[0]) for row in rows if bool((row == row[0]).all()) and len(row) > 1]
    first = whole[0] if whole else float(rows[0][0])
    return first, next(value for value in values if value != first)


def draw(spec: InputSpec, values: Values, shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """Random values like those of an example.

    Args:
        spec: the input.
        values: what its values are like.
        shape: of the result.
        generator: of the random numbers.

    Returns:
        a tensor of the input's dtype.
    """
    dtype = getattr(torch, spec.dtype)
    if values.pair is not None:
        return draw_pair(values.pair, values.order, shape, generator).to(dtype)
    numbers = _floats if dtype.is_floating_point else _integers
    return _ordered(numbers(values, shape, generator), values).to(dtype)


def draw_pair(
    pair: tuple[float, float], order: str, shape: Sequence[int], generator: torch.Generator
) -> torch.Tensor:
    """A mask. Rows of two or more have both values, so that neither fills a whole one; others have the first.

    Args:
        pair: the two values.
        order: `ascending` or `descending` where a row changes from one value to the other once; "" for any places.
        shape: of the result.
        generator: of the random numbers.
    """
    size = shape[-1] if shape else 1
    if size == 1:
        return torch.full(tuple(shape), pair[0], dtype=torch.float64)
    if order:
        first, second = sorted(pair, reverse=order == DESCENDING)
        ends = torch.randint(1, size, (*shape[:-1], 1), generator=generator)
        leads = torch.arange(size) < ends
    else:
        first, second = pair
        leads = torch.rand(tuple(shape), generator=generator) < 0.5
        leads[..., 0], leads[..., 1] = True, False
    return torch.where(leads, torch.tensor(first).double(), torch.tensor(second).double())


def _floats(values: Values, shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """Floats within the range of the example; where it has one value alone, of the same sign as that."""
    drawn = torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
    if values.low == values.high:
        near = drawn.clamp(-1, 1) * SPREAD
        return values.low * (1 + near) if values.low else drawn
    tensor = (values.mean + values.deviation * drawn).clamp(values.low, values.high)
    return tensor.round() if values.whole else tensor


def _integers(values: Values, shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """Whole numbers within the range of the example, and above it where a row needs more different ones."""
    low, high = int(values.low), int(values.high)
    if not values.strict:
        return torch.randint(low, high + 1, tuple(shape), generator=generator)
    size = shape[-1]
    count = max(high + 1 - low, size)
    keys = torch.rand((*shape[:-1], count), generator=generator)
    return low + keys.argsort(-1)[..., :size]


def _ordered(tensor: torch.Tensor, values: Values) -> torch.Tensor:
    """Rows in the order of the example; whole numbers that ascend start at its least, as offsets do at 0."""
    if not values.order or not tensor.dim() or not tensor.numel():
        return tensor
    tensor = tensor.sort(-1, descending=values.order == DESCENDING).values
    if values.whole and values.order == ASCENDING:
        tensor[..., 0] = values.low
    return tensor
