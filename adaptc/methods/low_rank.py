"""LoRA's relatives in PEFT: options, configuration, and where PEFT has them. The maths stays in each method."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from adaptc.errors import Fault
from adaptc.methods.method import Dropout
from adaptc.methods.param import Param
from adaptc.methods.peft_format import STARTS, PeftFormat
from adaptc.methods.rank import Scaled, factors
from adaptc.methods.site import ATTENTION, OUT_PROJECTION, Place, WeightSite
from adaptc.methods.tensors import svd

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
"""The refusal of `loftq_iter` where nothing is compensated."""
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""PEFT's initialisations that subtract something from the base's weights, which no checkpoint holds."""
LORA_STARTS = (*STARTS, "gaussian", "eva", "orthogonal", "mica")
"""PEFT's initialisations of LoRA that leave the base as it is."""
LORA_IGNORED = frozenset(
    {
        *("megatron_core", "qalora_group_size", "runtime_config", "merge_weights"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    }
)
"""PEFT's options of LoRA, of some versions, that a trained adapter needs no more."""
LORA_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    **dict.fromkeys(("use_qalora", "lora_bias", "use_bdlora"), (False, None)),
    **dict.fromkeys(("megatron_config", "velora_config", "monteclora_config", "arrow_config"), (None,)),
    **dict.fromkeys(("kasa_config", "alora_invocation_tokens"), (None,)),
    **dict.fromkeys(("layer_replication", "enable_lora"), (None, [])),
}
"""PEFT's options of LoRA that change what it computes and are not read -> their values that change nothing."""
LORA_HOSTS = frozenset({"modules_to_save", "trainable_token_indices"})
"""The keys by which other methods join PEFT's LoRA."""


@dataclass(frozen=True)
class LowRank(Scaled):
    """Options of a low-rank method. `rslora` scales by alpha / sqrt(r) (Kalajdzievski 2023, section 3)."""

    dropout: Dropout = 0.0
    rslora: Annotated[bool, Field(description="scale by alpha / sqrt(r)")] = False
    biases: Biases = "none"

    aliases: ClassVar[Mapping[str, str]] = {
        "lora_alpha": "alpha",
        "lora_dropout": "dropout",
        "use_rslora": "rslora",
        "bias": "biases",
    }
    fast = frozenset({"B"})

    def factors(self, site: WeightSite) -> dict[str, Param]:
        """A (r, in) and B (out, r) as PEFT keeps them."""
        return factors(site, self.r, self.in_peft(site), "lora_{}.weight", "lora_embedding_{}")

    @property
    def scale(self) -> float:
        """alpha / r, or alpha / sqrt(r) with `rslora`."""
        return self.alpha / (self.r**0.5 if self.rslora else self.r)


class Product(LowRank):
    """A method that can hold any change of a weight: the best approximation of its rank, scale B A."""

    @property
    def only_product(self) -> bool:
        """Whether with these options the change is scale B A, and nothing else changes."""
        return True

    @classmethod
    def of_ranks(cls, ranks: Mapping[str, int], biases: str) -> Self:
        """The method with a rank for each layer, by the layer's name, and a scale of one.

        Args:
            ranks: name of a layer -> its rank.
            biases: the option `biases`.
        """
        (most, _), *_ = Counter(ranks.values()).most_common(1)
        others = {f"^{re.escape(name)}": r for name, r in ranks.items() if r != most}
        options: dict[str, Any] = {"biases": biases, "rank_pattern": others}
        return cls(
            r=most, alpha=float(most), alpha_pattern={k: float(r) for k, r in others.items()}, **options
        )

    def nearest(self, change: Tensor) -> dict[str, Tensor]:
        """A `(r, in)` and B `(out, r)`, so that scale B A is nearest to a change `(out, in)` in the Frobenius norm.

        That is its truncated singular value decomposition (Eckart and Young 1936).
        """
        A, B = singular(change, self.r, self.scale)
        return {"A": A, "B": B}


class LowRankFormat(PeftFormat["LowRank"]):
    """PEFT's configuration of LoRA and its relatives."""

    @classmethod
    def of(
        cls,
        type: str,
        options: Mapping[str, str] | None = None,
        by_parameter: bool = False,
        changes_base: tuple[str, ...] = CHANGES_BASE,
        starts: tuple[object, ...] = LORA_STARTS,
        **fixed: object,
    ) -> Self:
        """The format that LoRA's relatives share.

        Args:
            type: PEFT's `peft_type`.
            options: options of this method alone: our name -> PEFT's key.
            by_parameter: see `PeftFormat`.
            changes_base: see `PeftFormat`.
            starts: the initialisations that are read.
            fixed: keys that must have, and are written with, this value.
        """
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
            ignored=LORA_IGNORED,
            neutral={
                "init_lora_weights": starts,
                **{key: v for key, v in LORA_NEUTRAL.items() if key not in (options or {}).values()},
            },
            ties=True,
            hosts=LORA_HOSTS,
            by_parameter=by_parameter,
            changes_base=changes_base,
        )

    def computed(self, options: dict[str, Any], targets: Sequence[str]) -> dict[str, Any]:
        """PEFT (0.21) adds the product twice to the output projection of an attention module that it adapts whole.

        Returns:
            the options, where `alpha_pattern` doubles alpha for these projections.
        """
        ranks: Mapping[str, int] = options.get("rank_pattern") or {}
        alphas: Mapping[str, float] = options.get("alpha_pattern") or {}
        inner = re.escape(OUT_PROJECTION)
        doubled: dict[str, float] = {f"(?:{key}){inner}": 2 * alpha for key, alpha in alphas.items()}
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
    """A and B as they start: factors of a matrix, which is factored once for both.

    Attributes:
        split: gives A `(r, in)` and B `(out, r)` of a matrix `(out, in)`, a rank and a scale.
        r: the rank.
        scale: what the product B A is multiplied by.
        factors: A and B of the last matrix, by the hash of its bytes.
    """

    split: Callable[[Tensor, int, float], tuple[Tensor, Tensor]]
    r: int
    scale: float
    factors: dict[bytes, tuple[Tensor, Tensor]] = field(default_factory=dict[bytes, "tuple[Tensor, Tensor]"])

    def A(self, W: Tensor, _: Generator) -> Tensor:  # noqa: N802 (the paper's name)
        """A `(r, in)`, as an init of a Param."""
        return self._of(W)[0]

    def B(self, W: Tensor, _: Generator) -> Tensor:  # noqa: N802
        """B `(out, r)`, as an init of a Param."""
        return self._of(W)[1]

    def _of(self, W: Tensor) -> tuple[Tensor, Tensor]:
        key = hashlib.sha256(W.contiguous().numpy().data).digest()
        if key not in self.factors:
            self.factors = {key: self.split(W, self.r, self.scale)}
        return self.factors[key]


def singular(W: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """A `(r, in)` and B `(out, r)`, so that scale B A is the best approximation of W `(out, in)` of rank r."""
    U, S, Vh = svd(W)
    root = (S[:r] / scale).sqrt()
    return root.unsqueeze(1) * Vh[:r], U[:, :r] * root


class CompensatesQuantization:
    """A method that compensates quantization where its option `init_weights` is "loftq".

    See `TrainingHooks.compensates`. `loftq_iter` says how often the weight is quantized.
    """

    init_weights: Any
    loftq_iter: int

    @classmethod
    def trained_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        """Options of a trained adapter: `init_weights` matters no more, unless the weight was quantized again."""
        again = options.get("init_weights") == "loftq" and options.get("loftq_iter", 1) > 1
        return options if again else options | {"init_weights": True}

    @property
    def compensates(self) -> bool:
        """Whether `init_weights` is "loftq"."""
        return self.init_weights == "loftq"

    @property
    def compensation_rounds(self) -> int:
        """`loftq_iter` where the method compensates, else 1."""
        return self.loftq_iter if self.compensates else 1
