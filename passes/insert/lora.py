"""LoRA: low-rank adaptation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from adaptc.errors import Fault
from adaptc.methods.low_rank import (
    LORA_STARTS,
    NOT_AGAIN,
    CompensatesQuantization,
    LowRank,
    LowRankFormat,
    Product,
    Rounds,
    Split,
    singular,
)
from adaptc.methods.method import method
from adaptc.methods.param import Param
from adaptc.methods.tensors import qr

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from adaptc.methods.site import Place, WeightSite

SPLITS = ("pissa", "olora")
"""Initialisations that make A and B of W."""
Initial = Annotated[
    Literal[True, "gaussian", "orthogonal", "pissa", "olora", "loftq"],
    Field(
        description="how A and B start: true is Kaiming-uniform and zero; pissa and olora make them of W; loftq "
        "compensates what quantization lost of W"
    ),
]


class LoraFormat(LowRankFormat):
    """PEFT's configuration of LoRA."""

    def write(self, options: dict[str, Any]) -> dict[str, Any]:
        """An adapter that started by compensating quantization is an ordinary one once it is trained."""
        return options | ({"init_weights": True} if options["init_weights"] == "loftq" else {})

    def covers(self, method: LowRank, site: Place) -> bool:
        """PEFT makes A and B of linear layers' weights only, and quantizes a weight once only."""
        assert isinstance(method, Lora)
        split = method.init_weights not in SPLITS or site.kind == "linear"
        return super().covers(method, site) and split and method.compensation_rounds == 1


@method("lora")
@dataclass(frozen=True)
class Lora(CompensatesQuantization, Product):
    """W' = W + (alpha / r) B A,  b' = b + (alpha / r) c  with `lora_bias`     A (r, in)   B (out, r)   c (out,)

    Hu et al. 2021, section 4.1. A starts Kaiming-uniform, B and c at zero, as in PEFT. With `init_weights` "pissa"
    (Meng et al. 2024, equations 2 to 4) A and B start as the r largest singular vectors of W, with "olora"
    (Büyükakyüz 2024, section 3) as the first r of its QR decomposition, and W' = W + (alpha / r) (B A - B0 A0). The
    initial values A0, B0 follow from W and are not stored. "orthogonal" starts with both random and B A = 0. With
    "loftq" (Li et al. 2023, algorithm 1) B A starts as the best approximation of rank r of what quantization lost,
    and W minus it is quantized again, `loftq_iter` - 1 times.
    """

    lora_bias: Annotated[bool, Field(description="a trained bias b on the output of B")] = False
    init_weights: Initial = True
    loftq_iter: Rounds = 1

    peft = LoraFormat.of(
        "LORA",
        {"lora_bias": "lora_bias", "init_weights": "init_lora_weights"},
        by_parameter=True,
        changes_base=("corda", "loftq", "lora_ga", "pissa_niter"),
        starts=(*LORA_STARTS, *SPLITS),
        use_dora=False,
        adaptc_nested=False,
    )
    aliases = {**LowRank.aliases, "init_lora_weights": "init_weights"}

    @classmethod
    def trained_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        """The same whatever its initialisation, unless that one needs A0 and B0."""
        return options if options.get("init_weights") in SPLITS else super().trained_options(options)

    @property
    def only_product(self) -> bool:
        """Not with a trained bias, nor where W is split into a part that is trained and one that is not."""
        return not self.lora_bias and self.init_weights not in SPLITS

    def compensation(self, lost: Tensor) -> Tensor:
        """The best approximation of rank r of what a matrix lost: scale B A as it starts."""
        A, B = singular(lost, self.r, self.scale)
        return self.scale * (B @ A)

    def params(self, site: WeightSite) -> dict[str, Param]:
        """A (r, in) Kaiming-uniform, B (out, r) zero, c (out,) zero; or A and B made of W."""
        params, r = self.factors(site), self.r
        if self.init_weights == "gaussian":
            params |= {"A": _starts(params["A"], lambda W, g: _normal(W, (r, W.shape[1]), g) / r)}
        if self.init_weights == "orthogonal":
            params |= {
                "A": _starts(
                    params["A"], lambda W, g: _rows(W, r, 0).T @ _normal(W, (r // 2, W.shape[1]), g) / 10
                ),
                "B": _starts(
                    params["B"], lambda W, g: _normal(W, (W.shape[0], r // 2), g) @ _rows(W, r, 1) / 10
                ),
            }
        split = Split(_triangular if self.init_weights == "olora" else singular, r, self.scale)
        if self.init_weights in (*SPLITS, "loftq"):
            params |= {"A": _starts(params["A"], split.A), "B": _starts(params["B"], split.B)}
        if self.init_weights in SPLITS:
            shapes = {"A0": (r, site.in_features), "B0": (site.out_features, r)}
            params |= {
                "A0": Param(shapes["A0"], split.A, "lora_A0", trained=False, stored=False),
                "B0": Param(shapes["B0"], split.B, "lora_B0", trained=False, stored=False),
            }
        c = {"c": Param((site.out_features,), "zeros", "lora_B.bias")} if self.lora_bias else {}
        return {**params, **c}

    def refuses(self, site: WeightSite) -> Fault | None:
        """A trained bias is added to the layer's; several matrices in one weight start in one way only."""
        if self.lora_bias and (site.bias is None or site.rows_repeat):
            return Fault(
                ("lora_bias",),
                "this layer has no bias, one for each row, that lora_bias could be folded into",
            )
        if self.init_weights is not True and site.batch is not None:
            return Fault(
                ("init_weights",), "several matrices in one weight start as true says: leave init_weights out"
            )
        if self.loftq_iter > 1 and not self.compensates:
            return NOT_AGAIN
        if self.init_weights == "orthogonal" and self.at(site).r % 2:
            return Fault(("init_weights",), f"orthogonal needs an even rank, got {self.at(site).r}")
        return None

    def adapts_bias(self) -> bool:
        """Only with `lora_bias`."""
        return self.lora_bias

    def weight(
        self,
        W: Tensor,
        *,
        A: Tensor,
        B: Tensor,
        A0: Tensor | None = None,
        B0: Tensor | None = None,
        c: Tensor | None = None,
    ) -> Tensor:
        """W + scale B A, of shape (out, in)."""
        start = W if A0 is None or B0 is None else W + -self.scale * (B0 @ A0)
        return start + self.scale * (B @ A)

    def bias(self, b: Tensor, *, c: Tensor, **_: Tensor) -> Tensor:
        """b + scale c, of shape (out,)."""
        return b + self.scale * c


def _triangular(W: Tensor, r: int, _: float) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r): the first r rows of R and columns of Q, of W = Q R."""
    Q, R = qr(W)
    return R[:r].clone(), Q[:, :r].clone()


def _normal(W: Tensor, shape: tuple[int, ...], generator: Generator) -> Tensor:
    return W.new_empty(shape).normal_(generator=generator)


def _rows(W: Tensor, r: int, first: int) -> Tensor:
    """Every second row of one random orthogonal matrix: the odd ones of A, the even ones of B."""
    import torch

    return qr(_normal(W, (r, r), torch.Generator().manual_seed(r)))[0][first::2]


def _starts(param: Param, init: Callable[[Tensor, Generator], Tensor]) -> Param:
    return Param(param.shape, init, param.key, param.unpack)
