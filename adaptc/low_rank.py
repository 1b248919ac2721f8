"""The policy that low-rank methods share: rank, scale, and per-layer patterns. The maths stays in each method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Self

from adaptc.method import Alpha, Dropout, PeftFormat, Rank, WeightMethod
from adaptc.names import matches_peft_key

if TYPE_CHECKING:
    from adaptc.sites import Site


@dataclass(frozen=True)
class LowRank(WeightMethod):
    """Options of a low-rank method. `rslora` scales by alpha / sqrt(r) (Kalajdzievski 2023, section 3)."""

    r: Rank = 8
    alpha: Alpha = 8.0
    dropout: Dropout = 0.0
    rslora: bool = False
    rank_pattern: Mapping[str, Rank] = field(default_factory=dict)
    alpha_pattern: Mapping[str, Alpha] = field(default_factory=dict)

    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    aliases: ClassVar[Mapping[str, str]] = {
        "lora_alpha": "alpha",
        "lora_dropout": "dropout",
        "use_rslora": "rslora",
    }

    @staticmethod
    def peft_format(kind: str, **fixed: object) -> PeftFormat:
        """PEFT's configuration of a low-rank method, which all of a kind share but for what is fixed."""
        return PeftFormat(
            kind,
            options={
                "r": "r",
                "alpha": "lora_alpha",
                "dropout": "lora_dropout",
                "rslora": "use_rslora",
                "rank_pattern": "rank_pattern",
                "alpha_pattern": "alpha_pattern",
            },
            fixed=fixed,
            ignored=frozenset(
                {"megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying"}
            ),
            changes_base=("pissa", "olora", "corda", "loftq", "lora_ga"),
        )

    def at(self, site: Site) -> Self:
        """The rank and alpha in force at this site: patterns first, then the entry's own."""
        rank = next((v for k, v in self.rank_pattern.items() if matches_peft_key(k, site.module)), self.r)
        alpha = next(
            (v for k, v in self.alpha_pattern.items() if matches_peft_key(k, site.module)), self.alpha
        )
        return replace(self, r=rank, alpha=alpha, rank_pattern={}, alpha_pattern={})

    def refuses(self, site: Site) -> tuple[tuple[str, ...], str] | None:
        """A rank above the smaller side of the weight adds parameters and no freedom."""
        limit, rank = min(site.in_features, site.out_features), self.at(site).r
        if rank <= limit:
            return None
        key = next((key for key in self.rank_pattern if matches_peft_key(key, site.module)), None)
        place = ("r",) if key is None else ("rank_pattern", key)
        return place, f"rank r must be at most {limit} here, got {rank}"

    @property
    def scale(self) -> float:
        """alpha / r, or alpha / sqrt(r) with `rslora`."""
        return self.alpha / (self.r**0.5 if self.rslora else self.r)
