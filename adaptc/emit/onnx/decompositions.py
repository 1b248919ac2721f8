"""Operations in terms of others that have ONNX forms, where torch has no decomposition or one that ends elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def stable_sort(
    x: Tensor, *, stable: bool | None = None, dim: int = -1, descending: bool = False
) -> tuple[Tensor, Tensor]:
    """ONNX's own order is stable: of equal values the one with the lower index comes first."""
    return aten.sort.default(x, dim, descending)


def smallest(x: Tensor, k: int, dim: int = -1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """`kthvalue`: the k-th smallest value along an axis, and its index."""
    values, indices = aten.sort.default(x, dim)
    at = k - 1
    picked = values.narrow(dim, at, 1), indices.narrow(dim, at, 1)
    return picked if keepdim else (picked[0].squeeze(dim), picked[1].squeeze(dim))


def median_along(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """The lower one of the two values in the middle, and its index."""
    return smallest(x, (x.shape[dim] + 1) // 2, dim, keepdim)


def median(x: Tensor) -> Tensor:
    """The lower one of the two values in the middle of all."""
    return median_along(x.reshape(-1), 0)[0]


def distances(x: Tensor, y: Tensor, p: float, mode: int | None) -> Tensor:
    """`cdist`: the p-norm of every row of x `(..., n, d)` less every row of y `(..., m, d)`, as `(..., n, m)`."""
    return aten.linalg_vector_norm.default(x.unsqueeze(-2) - y.unsqueeze(-3), p, [-1])


def selected(x: Tensor, mask: Tensor) -> Tensor:
    """The values where the mask is true."""
    values, chosen = aten.broadcast_tensors.default([x, mask])
    return values.reshape(-1)[chosen.reshape(-1)]


def hypotenuse(x: Tensor, y: Tensor) -> Tensor:
    """The square root of `x² + y²`."""
    larger = torch.maximum(x.abs(), y.abs()).clamp(min=torch.finfo(x.dtype).tiny)
    return larger * ((x / larger).square() + (y / larger).square()).sqrt()


def greater(x: Tensor, y: Tensor) -> Tensor:
    """`fmax`: the larger value, or the one that is a number."""
    return torch.where(x.isnan(), y, torch.where(y.isnan(), x, torch.maximum(x, y)))


def lesser(x: Tensor, y: Tensor) -> Tensor:
    """`fmin`: the smaller value, or the one that is a number."""
    return torch.where(x.isnan(), y, torch.where(y.isnan(), x, torch.minimum(x, y)))


def copied(x: Tensor, src: Tensor, non_blocking: bool = False) -> Any:
    """`copy` of a tensor to one of another shape."""
    same = x.dim() == src.dim() and all(a == b for a, b in zip(x.shape, src.shape, strict=True))
    return NotImplemented if same else src.to(x.dtype).expand(x.shape)


def chain(tensors: Sequence[Tensor]) -> Tensor:
    """`multi_dot`: the product of a chain of matrices, from the left, whatever their sizes are."""
    return reduce(torch.matmul, tensors)


def taken_from(x: Tensor, number: float, alpha: float = 1) -> Tensor:
    """`rsub`: a number less a tensor; one of another kind, such as in `1.0 - mask` of integers, is cast first."""
    return x.to(torch.result_type(x, number)) * -alpha + number


def without_axes(x: Tensor, dims: Sequence[int]) -> Tensor:
    """`squeeze` of the axes among these whose size is 1."""
    for dim in sorted((dim % x.dim() for dim in dims), reverse=True):
        x = aten.squeeze.dim(x, dim) if x.shape[dim] == 1 else x
    return x


def without_axis(x: Tensor, dim: int) -> Any:
    """`squeeze` of an axis that has other sizes than 1."""
    return NotImplemented if x.shape[dim] == 1 else aten.alias.default(x)


def scattered_mean(
    x: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, *, include_self: bool = True
) -> Any:
    """`scatter_reduce` by the mean: the sum over the number of values."""
    if reduce != "mean":
        return NotImplemented
    scatter = partial(aten.scatter_reduce.two, reduce="sum", include_self=include_self)
    return scatter(x, dim, index, src) / scatter(torch.ones_like(x), dim, index, torch.ones_like(src))


DECOMPOSITIONS: Mapping[Any, Callable[..., Any]] = {
    aten.sort.stable: stable_sort,
    aten.kthvalue.default: smallest,
    aten.median.dim: median_along,
    aten.median.default: median,
    aten._cdist_forward.default: distances,
    aten.masked_select.default: selected,
    aten.hypot.default: hypotenuse,
    aten.fmax.default: greater,
    aten.fmin.default: lesser,
    aten.copy.default: copied,
    aten.rsub.Scalar: taken_from,
    aten.squeeze.dims: without_axes,
    aten.squeeze.dim: without_axis,
    aten.scatter_reduce.two: scattered_mean,
}
"""Operation -> what computes it, or gives NotImplemented where the operation has a form."""
COMPOSITE: Mapping[Any, Callable[..., Any]] = {aten.linalg_multi_dot.default: chain}
"""The same for operations that torch takes apart before it asks for a decomposition, by comparing their sizes."""
