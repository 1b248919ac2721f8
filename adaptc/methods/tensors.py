"""Operations of torch that it gives no types, or does not have in 16 bits, for the maths of methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def norm(x: Tensor, dim: int | tuple[int, ...] | None = None, keepdim: bool = False) -> Tensor:
    """The Euclidean norm over some axes, or of the whole tensor: `x.norm(dim=..., keepdim=...)`."""
    tensor: Any = x
    return tensor.norm(dim=dim, keepdim=keepdim)


def unflatten(x: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    """One axis as several; a size of -1 follows from the others: `x.unflatten(dim, sizes)`."""
    tensor: Any = x
    return tensor.unflatten(dim, sizes)


def svd(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The reduced singular value decomposition `W = U diag(S) Vh` of a matrix `(out, in)`.

    Returns:
        U `(out, k)`, S `(k,)` in descending order, Vh `(k, in)`, k the smaller of out and in.
    """
    import torch

    linalg: Any = torch.linalg
    return linalg.svd(W, full_matrices=False)


def qr(W: Tensor) -> tuple[Tensor, Tensor]:
    """The reduced decomposition `W = Q R` of a matrix `(out, in)`.

    Returns:
        Q `(out, k)` of orthonormal columns, R `(k, in)` upper triangular, k the smaller of out and in.
    """
    import torch

    linalg: Any = torch.linalg
    return linalg.qr(W)


def cayley(S: Tensor) -> Tensor:
    """The rotations `(I - S) (I + S)⁻¹` of skew-symmetric matrices `(..., b, b)`, in their dtype.

    Torch has no solver for 16-bit numbers, so those are solved in float32.
    """
    import torch

    linalg: Any = torch.linalg
    identity = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
    denominator, numerator = identity + S, identity - S
    if S.dtype.itemsize == 2:
        denominator, numerator = denominator.float(), numerator.float()
    return linalg.solve_ex(denominator, numerator, left=False)[0].to(S.dtype)
