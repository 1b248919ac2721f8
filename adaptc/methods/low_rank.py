"""LoRA's relatives in PEFT: options, configuration, and where PEFT has them. The maths stays in each method."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from adaptc.errors import Fault
from adaptc.methods.method import Dropout
from adaptc.methods.param import Param
from adaptc.methods.peft_format import PeftFormat
from adaptc.methods.rank import Scaled, factors
from adaptc.methods.site import ATTENTION, OUT_PROJECTION, Place, WeightSite

if TYPE_CHECKING:
    from torch import Generator, Tensor

Biases = Annotated[
    Literal["none", "all", "lora_only"],
    Field(description="biases trained along: none, those of the adapted layers (lora_only), or all"),
]
Rounds = Annotated[
    int, Field(ge=1, description="with loftq, how often W is quantized, each time without what B A then is")
]
NOT_AGAIN = Fault(("loftq_iter",), "only `init_weights: loftq` quantizes again: leave it out")
"""Why an option that says how often makes no sense."""
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""PEFT's initialisations that take something out of the base's weights, which no checkpoint tells."""


@dataclass(frozen=True)
class LowRank(Scaled):
    """Options of a low-rank method. `rslora` scales by alpha / sqrt(r) (Kalajdzievski 2023, section 3)."""

    dropout: Dropout = 0.0
    rslora: bool = False
    biases: Biases = "none"

    aliases: ClassVar[Mapping[str, str]] = {
        "lora_alpha": "alpha",
        "lora_dropout": "dropout",
        "use_rslora": "rslora",
        "bias": "biases",
    }
    fast: ClassVar[frozenset[str]] = frozenset({"B"})

    def factors(self, site: WeightSite) -> dict[str, Param]:
        """A (r, in) and B (out, r) as PEFT keeps them."""
        return factors(site, self.r, self.in_peft(site), "lora_{}.weight", "lora_embedding_{}")

    @property
    def scale(self) -> float:
        """alpha / r, or alpha / sqrt(r) with `rslora`."""
        return self.alpha / (self.r**0.5 if self.rslora else self.r)


class LowRankFormat(PeftFormat["LowRank"]):
    """PEFT's configuration of LoRA and its relatives."""

    @classmethod
    def of(
        cls,
        type: str,
        options: Mapping[str, str] | None = None,
        by_parameter: bool = False,
        changes_base: tuple[str, ...] = CHANGES_BASE,
        **fixed: object,
    ) -> Self:
        """The format of a `peft_type`, which all of them share but for more options and what is fixed."""
        return cls(
            type,
            options={
                "r": "r",
                "alpha": "lora_alpha",
                "dropout": "lora_dropout",
                "rslora": "use_rslora",
                "rank_pattern": "rank_pattern",
                "alpha_pattern": "alpha_pattern",
                "biases": "bias",
                **(options or {}),
            },
            fixed=fixed,
            ignored=frozenset(
                {"megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying"}
            ),
            by_parameter=by_parameter,
            changes_base=changes_base,
        )

    def computed(self, options: dict[str, Any], targets: Sequence[str]) -> dict[str, Any]:
        """PEFT (0.21) adds the product twice to the output projection of an attention module that it adapts whole."""
        ranks, alphas = options.get("rank_pattern") or {}, options.get("alpha_pattern") or {}
        inner = re.escape(OUT_PROJECTION)
        doubled = {f"(?:{key}){inner}": 2 * alpha for key, alpha in alphas.items()}
        doubled |= {f"(?:{key}){inner}": 2 * options.get("alpha", LowRank.alpha) for key in targets}
        same = {f"(?:{key}){inner}": rank for key, rank in ranks.items()}
        return {**options, "rank_pattern": {**same, **ranks}, "alpha_pattern": {**doubled, **alphas}}

    def covers(self, method: LowRank, site: Place) -> bool:
        """PEFT's low-rank grouped convolution reaches across groups, which no weight here can."""
        assert isinstance(site, WeightSite)
        if site.type == ATTENTION and site.module.endswith(OUT_PROJECTION):
            whole = method.alpha_at(site.module.removesuffix(OUT_PROJECTION))
            return method.alpha_at(site.module) == 2 * whole
        if site.by_parameter:
            return self.by_parameter and not method.dropout
        return site.kind != "conv" or (site.groups == 1 and "transpose" not in site.op)


@dataclass
class Split:
    """A matrix taken apart once for A and B, which start as its two factors."""

    split: Callable[[Tensor, int, float], tuple[Tensor, Tensor]]
    r: int
    scale: float
    known: dict[bytes, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def A(self, W: Tensor, _: Generator) -> Tensor:  # noqa: N802 (the paper's name)
        """The inner factor `(r, in)`."""
        return self._of(W)[0]

    def B(self, W: Tensor, _: Generator) -> Tensor:  # noqa: N802
        """The outer factor `(out, r)`."""
        return self._of(W)[1]

    def _of(self, W: Tensor) -> tuple[Tensor, Tensor]:
        key = hashlib.sha256(W.contiguous().numpy().data).digest()
        if key not in self.known:
            self.known = {key: self.split(W, self.r, self.scale)}
        return self.known[key]


def singular(W: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """A and B, of which scale B A is the best approximation of W of rank r."""
    import torch

    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    root = (S[:r] / scale).sqrt()
    return root.unsqueeze(1) * Vh[:r], U[:, :r] * root


class CompensatesQuantization:
    """A method that may start by making up for quantization: its `init_weights` "loftq", and `loftq_iter`."""

    init_weights: Any
    loftq_iter: int

    @classmethod
    def trained_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        """What has made up for quantization once is an adapter like any other when it is trained."""
        again = options.get("init_weights") == "loftq" and options.get("loftq_iter", 1) > 1
        return options if again else options | {"init_weights": True}

    @property
    def compensates(self) -> bool:
        """With "loftq"."""
        return self.init_weights == "loftq"

    @property
    def compensation_rounds(self) -> int:
        """`loftq_iter`, where it makes up for anything."""
        return self.loftq_iter if self.compensates else 1
