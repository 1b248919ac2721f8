"""The policy that low-rank methods share: rank, scale, and per-layer patterns. The maths stays in each method."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from adaptc.method import MATRIX_KINDS, Alpha, Dropout, Param, PeftFormat, Rank, WeightMethod
from adaptc.names import ATTENTION, OUT_PROJECTION, PACKED, matches_peft_key

if TYPE_CHECKING:
    from adaptc.sites import Site

DROPLESS = frozenset({"embedding", "experts"})
"""Kinds of site whose input dropout cannot go in front of: indices, and rows gathered for an expert."""
Biases = Annotated[
    Literal["none", "all", "lora_only"],
    Field(description="biases trained along: none, those of the adapted layers (lora_only), or all"),
]


@dataclass(frozen=True)
class LowRank(WeightMethod):
    """Options of a low-rank method. `rslora` scales by alpha / sqrt(r) (Kalajdzievski 2023, section 3)."""

    r: Rank = 8
    alpha: Alpha = 8.0
    dropout: Dropout = 0.0
    rslora: bool = False
    rank_pattern: Mapping[str, Rank] = field(default_factory=dict)
    alpha_pattern: Mapping[str, Alpha] = field(default_factory=dict)
    biases: Biases = "none"

    kinds: ClassVar[frozenset[str]] = MATRIX_KINDS
    aliases: ClassVar[Mapping[str, str]] = {
        "lora_alpha": "alpha",
        "lora_dropout": "dropout",
        "use_rslora": "rslora",
        "bias": "biases",
    }

    @staticmethod
    def peft_format(
        kind: str, options: Mapping[str, str] | None = None, by_parameter: bool = False, **fixed: object
    ) -> PeftFormat:
        """PEFT's configuration, which all of a kind share but for more options and what is fixed."""
        return PeftFormat(
            kind,
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
            changes_base=("pissa", "olora", "corda", "loftq", "lora_ga"),
        )

    def at(self, site: Site) -> Self:
        """The rank and alpha in force at this site: patterns first, then the entry's own."""
        name = _name(site)
        rank = next((v for k, v in self.rank_pattern.items() if matches_peft_key(k, name)), self.r)
        alpha = self._alpha_of(name)
        dropout = 0.0 if site.kind in DROPLESS else self.dropout
        return replace(self, r=rank, alpha=alpha, dropout=dropout, rank_pattern={}, alpha_pattern={})

    def _alpha_of(self, name: str) -> float:
        return next((v for k, v in self.alpha_pattern.items() if matches_peft_key(k, name)), self.alpha)

    @classmethod
    def from_peft(cls, options: dict[str, Any], targets: Sequence[str]) -> dict[str, Any]:
        """PEFT (0.21) adds the product twice to the output projection of an attention module that it adapts whole."""
        ranks, alphas = options.get("rank_pattern") or {}, options.get("alpha_pattern") or {}
        inner = re.escape(OUT_PROJECTION)
        doubled = {f"(?:{key}){inner}": 2 * alpha for key, alpha in alphas.items()}
        doubled |= {f"(?:{key}){inner}": 2 * options.get("alpha", cls.alpha) for key in targets}
        same = {f"(?:{key}){inner}": rank for key, rank in ranks.items()}
        return {**options, "rank_pattern": {**same, **ranks}, "alpha_pattern": {**doubled, **alphas}}

    def factors(self, site: Site) -> dict[str, Param]:
        """A (r, in) and B (out, r), named, shaped and initialised as PEFT does on each kind of site; B A is zero.

        A convolution's are kernels, fused experts' stand beside one another: A (experts r, in), B (out, r experts).
        """
        r, out, inner, keys = self.r, site.out_features, site.in_features, ("lora_A.weight", "lora_B.weight")
        if site.kind == "embedding":
            return {
                "A": Param((r, inner), "zeros", "lora_embedding_A"),
                "B": Param((out, r), "standard-normal", "lora_embedding_B"),
            }
        if site.kind == "conv" and self.in_peft(site):
            ones = (1,) * (len(site.shape) - 2)
            return {
                "A": Param((r, *site.inner_shape), "kaiming-uniform", keys[0], lambda A: A.flatten(1)),
                "B": Param((out, r, *ones), "zeros", keys[1], lambda B: B.flatten(1)),
            }
        if site.batch is not None:
            n = site.batch
            return {
                "A": Param((n * r, inner), "kaiming-uniform", keys[0], lambda A: A.unflatten(0, (n, r))),
                "B": Param((out, r * n), "zeros", keys[1], lambda B: B.unflatten(1, (r, n)).permute(2, 0, 1)),
            }
        return {"A": Param((r, inner), "kaiming-uniform", keys[0]), "B": Param((out, r), "zeros", keys[1])}

    def in_peft(self, site: Site) -> bool:
        """PEFT's low-rank grouped convolution reaches across groups, which no weight here can."""
        if site.type == ATTENTION and site.module.endswith(OUT_PROJECTION):
            whole = self._alpha_of(site.module.removesuffix(OUT_PROJECTION))
            return self.peft is not None and self._alpha_of(site.module) == 2 * whole
        if site.by_parameter:
            return self.peft is not None and self.peft.by_parameter and not self.dropout
        known = site.kind != "conv" or (site.groups == 1 and "transpose" not in site.op)
        return self.peft is not None and known

    def refuses_to_train(self, site: Site) -> tuple[tuple[str, ...], str] | None:
        """A rank above the smaller side of the weight adds parameters and no freedom; indices cannot be dropped."""
        limit, rank = min(site.in_features, site.out_features), self.at(site).r
        if self.dropout and site.kind in DROPLESS:
            return (
                "dropout",
            ), f"dropout has no input to go in front of on {site.kind}: leave it out for this entry"
        if rank <= limit:
            return None
        key = next((key for key in self.rank_pattern if matches_peft_key(key, _name(site))), None)
        place = ("r",) if key is None else ("rank_pattern", key)
        return place, f"rank r must be at most {limit} here, got {rank}"

    @property
    def scale(self) -> float:
        """alpha / r, or alpha / sqrt(r) with `rslora`."""
        return self.alpha / (self.r**0.5 if self.rslora else self.r)


def _name(site: Site) -> str:
    """What PEFT holds its patterns against: the module, or a parameter that is targeted by its own name."""
    return site.module if site.leaf in ("weight", PACKED) else f"{site.module}.{site.leaf}"
