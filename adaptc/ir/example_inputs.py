"""Random inputs of a model, for the trace and for proofs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from adaptc.errors import TraceError
from adaptc.inputs import ASCENDING, DESCENDING, InputSpec
from adaptc.ir.drawn_values import draw, draw_pair

EXAMPLE_SIZES = (3, 17, 11, 19, 23, 29, 31)
"""Sizes of named dimensions in the trace: distinct, so that none is taken for another, and not 1, which broadcasts."""


def example_sizes(inputs: Sequence[InputSpec], among: Sequence[int] | None = None) -> dict[str, int]:
    """A size for every named dimension, in the order of appearance.

    Args:
        inputs: of the model.
        among: the sizes to take, in this order; if left out those of the examples that were given, where they differ
            and are not 1, and `EXAMPLE_SIZES`.

    Returns:
        name of the dimension -> size.

    Raises:
        TraceError: there are more dimensions than sizes.
    """
    names = dict.fromkeys(dim for spec in inputs for dim in spec.dims if isinstance(dim, str))
    if len(names) > len(EXAMPLE_SIZES):
        raise TraceError(
            f"at most {len(EXAMPLE_SIZES)} named dimensions are supported, got {', '.join(names)}"
        )
    if among is not None:
        return _with_placeholders(inputs, dict(zip(names, among, strict=False)))
    given = _given_sizes(inputs)
    others = [size for size in EXAMPLE_SIZES if size not in given.values()]
    return _with_placeholders(inputs, {name: given.get(name) or others.pop(0) for name in names})


def _with_placeholders(inputs: Sequence[InputSpec], sizes: dict[str, int]) -> dict[str, int]:
    """The sizes, with those of rows that hold placeholders longer by as many."""
    counts = {str(spec.dims[-1]): spec.placeholders[1] for spec in inputs if spec.placeholders}
    return {name: size + counts.get(name, 0) for name, size in sizes.items()}


def _given_sizes(inputs: Sequence[InputSpec]) -> dict[str, int]:
    """The sizes of the examples by the name of the dimension; without 1, and a size only for its first dimension."""
    sizes = {
        dim: size
        for spec in reversed(inputs)
        for dim, size in zip(spec.dims, spec.example, strict=False)
        if isinstance(dim, str)
    }
    first = {size: name for name, size in reversed(sizes.items())}
    return {name: size for size, name in first.items() if size > 1}


def example_tensors(
    inputs: Sequence[InputSpec], sizes: Mapping[str, int], seed: int = 0, pad: bool = False
) -> dict[str, torch.Tensor]:
    """Random inputs of a model, like its examples where it has any.

    What a model counts itself is counted. Others are normal floats, boxes with their corners in order, integers below
    the input's `high`. Placeholders are at the start of each row, after the first value. Masks of integers are ones;
    with `pad`, the last row ends with zeros in its second half. Rows of booleans have both values, so that none masks a
    whole row, whether True means taken or hidden.

    Args:
        inputs: of the model.
        sizes: name of a dimension -> size.
        seed: of the random numbers.
        pad: whether masks have zeros.

    Returns:
        name of the input -> tensor.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for spec in inputs:
        shape = [sizes[dim] if isinstance(dim, str) else dim for dim in spec.dims]
        dtype = getattr(torch, spec.dtype)
        if spec.values is not None:
            tensor = draw(spec, spec.values, shape, generator)
        elif spec.counted:
            tensor = torch.arange(shape[-1]).expand(shape).to(dtype, copy=True)
        elif spec.boxes:
            tensor = _boxes(spec, shape, generator)
        elif dtype.is_floating_point:
            tensor = torch.randn(shape, generator=generator).to(dtype)
        elif dtype == torch.bool:
            tensor = _booleans(spec.name, shape, generator)
        elif "mask" in spec.name:
            tensor = torch.ones(shape, dtype=dtype)
            if pad and tensor.dim() == 2 and tensor.shape[1] > 1:
                tensor[-1, -(tensor.shape[1] // 2) :] = 0
        else:
            tensor = torch.randint(0, spec.high or 2, shape, generator=generator).to(dtype)
        tensors[spec.name] = _placed(spec, tensor)
    return tensors


def _boxes(spec: InputSpec, shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """Random boxes: integers below the input's `high`, or fractions of a page where it has none."""
    dtype = getattr(torch, spec.dtype)
    corners = torch.rand([*shape[:-1], 2, shape[-1] // 2], generator=generator)
    corners = corners.sort(dim=-2).values.flatten(-2)
    return (corners * spec.high).long().to(dtype) if spec.high else corners.to(dtype)


def _booleans(name: str, shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """Booleans of both values. A mask changes once in a row: from False to True where it is named after padding."""
    order = ASCENDING if "pad" in name else DESCENDING if "mask" in name else ""
    pair = (0.0, 1.0) if "pad" in name else (1.0, 0.0)
    return draw_pair(pair, order, shape, generator).bool()


def _placed(spec: InputSpec, values: torch.Tensor) -> torch.Tensor:
    """Random integers with the input's placeholders in each row, and no other value like them."""
    if spec.placeholders is None:
        return values
    token, count = spec.placeholders
    values = torch.where(values == token, torch.full_like(values, 0 if token else 1), values)
    values[..., 1 : 1 + count] = token
    return values
