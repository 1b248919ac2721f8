"""OFT: orthogonal fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from adaptc.errors import Fault
from adaptc.methods.method import WeightMethod, method
from adaptc.methods.param import Param
from adaptc.methods.peft_format import PeftFormat
from adaptc.methods.site import MATRIX_KINDS
from adaptc.methods.tensors import cayley, norm, unflatten

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from adaptc.methods.site import WeightSite

Count = Annotated[int, Field(ge=0)]


@method("oft")
@dataclass(frozen=True)
class Oft(WeightMethod):
    """W' = W diag(R_1, …, R_n)ᵀ,  R = (I - Q) (I + Q)⁻¹,  Q skew        Q (n, b (b - 1) / 2),  n b = in

    Qiu et al. 2023, section 3.2, on the columns of W: the input is rotated, in blocks of `block_size` (or `r` blocks).
    Of an embedding (words, features) what it gives is rotated instead, as in PEFT: W' = W diag(R_1, …, R_n).
    With `use_cayley_neumann` (Qiu et al. 2025, equation 4) R is I + 2 Q + 2 Q² + … instead, the inverse rotation as a
    series of `num_cayley_neumann_terms` terms, as in PEFT. `coft` keeps ‖Q‖ below `eps`; `block_share` rotates all
    blocks alike. A block size that does not divide the input becomes the nearest that does. Q is stored as upper
    triangles and starts at zero.
    """

    r: Annotated[Count, Field(description="number of blocks, in place of block_size")] = 0
    block_size: Annotated[int, Field(ge=0, description="32, unless r is given")] = 0
    coft: Annotated[bool, Field(description="keep each rotation near the identity, by eps")] = False
    eps: Annotated[float, Field(description="how far from the identity coft lets a rotation go")] = 6e-5
    block_share: Annotated[bool, Field(description="one rotation for all blocks")] = False
    use_cayley_neumann: Annotated[bool, Field(description="take a sum of powers in place of an inverse")] = (
        True
    )
    num_cayley_neumann_terms: Annotated[int, Field(ge=1, description="how many powers that sum has")] = 5

    kinds = MATRIX_KINDS
    small = {"r": 0, "block_size": 4}
    aliases = {"oft_block_size": "block_size"}
    peft = PeftFormat(
        "OFT",
        options={
            "r": "r",
            "block_size": "oft_block_size",
            **{name: name for name in ("coft", "eps", "block_share", "use_cayley_neumann")},
            "num_cayley_neumann_terms": "num_cayley_neumann_terms",
        },
        ignored=frozenset({"module_dropout"}),
        layers=frozenset({"Linear", "Conv2d", "Embedding"}),
        square=True,
    )

    def __post_init__(self) -> None:
        """Blocks of 32, where neither size nor number is given."""
        if not self.r and not self.block_size:
            object.__setattr__(self, "block_size", 32)

    def refuses(self, site: WeightSite) -> Fault | None:
        """Size and number of the blocks exclude each other, and a block of size 1 cannot rotate."""
        if self.r and self.block_size:
            return Fault(("r",), "write one of r (how many blocks) and block_size")
        if self._block(_turned(site)) == 1:
            return Fault(
                ("block_size",),
                f"no block but of size 1 divides {_turned(site)}, and such a block cannot turn",
            )
        return None

    def params(self, site: WeightSite) -> dict[str, Param]:
        """Q's upper triangles, zero: (blocks, b (b - 1) / 2)."""
        b = self._block(_turned(site))
        shape = (1 if self.block_share else _turned(site) // b, b * (b - 1) // 2)
        if site.kind == "embedding":
            return {"Q_of_rows": Param(shape, "zeros", "oft_embedding_R.weight")}
        return {"Q": Param(shape, "zeros", "oft_R.weight")}

    def shared(self, sites: Sequence[WeightSite]) -> dict[str, Param]:
        """For each block size b, which entry of the upper triangle each of b x b entries is, and with which sign.

        Returns:
            `place_{b}` (b b,) and `sign_{b}` (b, b), for every b.
        """
        params: dict[str, Param] = {}
        for b in sorted({self._block(_turned(site)) for site in sites}):
            params |= _skew(b)
        return params

    def weight(
        self, W: Tensor, *, Q: Tensor | None = None, Q_of_rows: Tensor | None = None, **of_blocks: Tensor
    ) -> Tensor:
        """Each block of W's columns times Rᵀ, of shape (out, in); an embedding's rows times R on their left, turned."""
        if Q is not None:
            return self._times(W, self._rotations(Q, W.shape[1], of_blocks).transpose(1, 2))
        assert Q_of_rows is not None
        return self._times(W.T, self._rotations(Q_of_rows, W.shape[0], of_blocks)).T

    def _rotations(self, Q: Tensor, size: int, of_blocks: Mapping[str, Tensor]) -> Tensor:
        """R of every block of so many columns: (blocks, b, b)."""
        b = self._block(size)
        S = unflatten(Q.index_select(1, of_blocks[f"place_{b}"]), 1, (b, b)) * of_blocks[f"sign_{b}"]
        R = self._rotation(_bounded(S, self.eps * len(Q) ** -0.5) if self.coft else S)
        return R.expand(size // b, b, b)

    def _times(self, W: Tensor, R: Tensor) -> Tensor:
        """Each block of W's columns times its own matrix of R (blocks, b, b)."""
        blocks = unflatten(W, 1, (len(R), R.shape[1])).transpose(0, 1)
        return blocks.bmm(R).transpose(0, 1).flatten(1)

    def _rotation(self, Q: Tensor) -> Tensor:
        """R of skew-symmetric blocks (n, b, b), exact or as a series."""
        import torch

        if not self.use_cayley_neumann:
            return cayley(Q)
        identity, terms = (
            torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device),
            self.num_cayley_neumann_terms,
        )
        if terms == 1:
            return identity.expand_as(Q)
        series, power = identity + 2 * Q, Q
        last = 0 if terms == 2 else max(3, terms - 1)
        for exponent in range(2, last + 1):
            power = power.bmm(Q)
            series = series + (power if exponent == last else 2 * power)
        return series

    def refuses_to_train(self, site: WeightSite) -> Fault | None:
        """The block size must divide the input; a trained adapter of PEFT has the nearest that does."""
        option, size = ("block_size", self.block_size) if self.block_size else ("r", self.r)
        columns = _turned(site)
        if columns % size == 0 or size > columns:
            return super().refuses_to_train(site)
        fits = _nearest_divisor(columns, size)
        return Fault((option,), f"{option}={size} does not divide the {columns} columns here; {fits} does")

    def _block(self, size: int) -> int:
        """The size of a block on so many columns."""
        if self.block_size:
            return _nearest_divisor(size, self.block_size)
        return size // _nearest_divisor(size, self.r)


def _turned(site: WeightSite) -> int:
    """How many columns are rotated: the inputs of a layer, the features of an embedding."""
    return site.out_features if site.kind == "embedding" else site.in_features


def _nearest_divisor(size: int, wanted: int) -> int:
    """The divisor of a size that is nearest to a number; of two the smaller one."""
    if wanted >= size:
        return size
    above = next(n for n in range(wanted, size + 1) if size % n == 0)
    below = next(n for n in range(wanted, 0, -1) if size % n == 0)
    return below if wanted - below <= above - wanted else above


def _skew(b: int) -> dict[str, Param]:
    """The index of each entry of a skew-symmetric matrix (b, b) in its upper triangle, and the entry's sign."""

    def places(_: Tensor, __: Generator) -> Tensor:
        return _places(b)

    place = Param((b * b,), places, f"oft_place_{b}", trained=False, stored=False, below=b * b)
    sign = Param((b, b), lambda W, _: _signs(W, b), f"oft_sign_{b}", trained=False, stored=False)
    return {f"place_{b}": place, f"sign_{b}": sign}


def _places(b: int) -> Tensor:
    """Row after row, the index of each entry of a matrix (b, b) among those above the diagonal."""
    import torch

    at = torch.arange(b)
    low, high = torch.minimum(at.unsqueeze(1), at), torch.maximum(at.unsqueeze(1), at)
    return (low * (2 * b - low - 1) // 2 + high - low - 1).clamp(0, max(0, b * (b - 1) // 2 - 1)).flatten()


def _signs(W: Tensor, b: int) -> Tensor:
    """A matrix (b, b) of 1 above the diagonal, 0 on it and -1 below it, in the dtype of W."""
    ones = W.new_ones(b, b)
    return ones.triu(1) - ones.tril(-1)


def _bounded(Q: Tensor, eps: float) -> Tensor:
    """Q of each block (n, b, b), scaled down where its norm is above eps."""
    lengths = norm(Q, (1, 2), keepdim=True)
    return Q * (eps / lengths.clamp_min(eps))
