"""AdaLoRA: adaptive budget allocation for low-rank adaptation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field

from adaptc.errors import Fault
from adaptc.methods.low_rank import LORA_HOSTS, LORA_IGNORED, LORA_NEUTRAL
from adaptc.methods.method import Alpha, Dropout, Rank, WeightMethod, method
from adaptc.methods.param import Param
from adaptc.methods.peft_format import PeftFormat
from adaptc.methods.site import MATRIX_KINDS
from adaptc.methods.tensors import norm
from adaptc.methods.training_rule import TrainingRule

if TYPE_CHECKING:
    from torch import Tensor

    from adaptc.methods.site import WeightSite

Steps = Annotated[int, Field(ge=0)]
Decay = Annotated[float, Field(gt=0, lt=1)]
RankPattern = Annotated[
    Mapping[str, tuple[bool, ...]], Field(description="which ranks of a layer are left, by PEFT's names")
]


class AdaloraFormat(PeftFormat["Adalora"]):
    """PEFT's configuration of AdaLoRA."""

    def write(self, options: dict[str, Any]) -> dict[str, Any]:
        """PEFT needs a number of steps larger than those of its schedule, and writes null for no pattern."""
        total = options["total_step"] or options["tinit"] + options["tfinal"] + 1
        return options | {"total_step": total, "rank_pattern": options["rank_pattern"] or None}

    def read(self, options: dict[str, Any]) -> dict[str, Any]:
        """An empty pattern where PEFT writes null."""
        return options | {"rank_pattern": options.get("rank_pattern") or {}}


@method("adalora")
@dataclass(frozen=True)
class Adalora(WeightMethod):
    """W' = W + (alpha / init_r) P diag(e) Q        P (out, r)   e (r, 1)   Q (r, in)

    Zhang et al. 2023. The penalty `orth_reg_weight` (‖PᵀP - I‖ + ‖QQᵀ - I‖) keeps the product near a singular value
    decomposition (equation 4). Every layer starts with `init_r` ranks. The least sensitive ranks of all layers are
    pruned (equations 8 to 10) until `target_r` a layer remain: none in the first `tinit` steps, then at a cubic rate,
    every `deltaT` steps, and none in the last `tfinal` steps (equation 12). `adaptc.TrainingStep` prunes them;
    checkpoints do not hold pruned ranks. e starts at zero.
    """

    init_r: Rank = 12
    target_r: Rank = 8
    alpha: Alpha = 8.0
    dropout: Dropout = 0.0
    tinit: Annotated[Steps, Field(description="steps before ranks begin to fall")] = 0
    tfinal: Annotated[Steps, Field(description="steps at the end during which ranks stay")] = 0
    deltaT: Rank = 1  # noqa: N815 (the paper's spelling)
    beta1: Annotated[Decay, Field(description="how slowly the smoothed importance of a rank follows")] = 0.85
    beta2: Annotated[Decay, Field(description="how slowly its smoothed uncertainty follows")] = 0.85
    orth_reg_weight: Annotated[
        float, Field(ge=0, description="weight of the loss that keeps P and Q orthogonal")
    ] = 0.5
    total_step: Annotated[Rank | None, Field(description="steps of the whole training")] = None
    rank_pattern: RankPattern = field(default_factory=dict[str, tuple[bool, ...]])

    kinds = MATRIX_KINDS
    small = {"init_r": 4, "target_r": 2}
    aliases = {"lora_alpha": "alpha", "lora_dropout": "dropout"}
    peft = AdaloraFormat(
        "ADALORA",
        options={
            "alpha": "lora_alpha",
            "dropout": "lora_dropout",
            **{name: name for name in ("init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2")},
            **{name: name for name in ("orth_reg_weight", "total_step", "rank_pattern")},
        },
        ignored=LORA_IGNORED | {"r", "init_lora_weights"},
        neutral={
            **LORA_NEUTRAL,
            "bias": ("none",),
            "use_rslora": (False, None),
            "use_dora": (False, None),
            "alpha_pattern": ({}, None),
        },
        ties=True,
        hosts=LORA_HOSTS,
        layers=frozenset({"Linear", "Conv1D", "Conv2d"}),
    )

    while_training = frozenset(
        {
            "dropout",
            "target_r",
            "tinit",
            "tfinal",
            "deltaT",
            "beta1",
            "beta2",
            "orth_reg_weight",
            "total_step",
        }
    )

    def refuses_to_train(self, site: WeightSite) -> Fault | None:
        """A rank above the smaller side adds parameters and no freedom; the number of ranks only shrinks."""
        limit = min(site.in_features, site.out_features)
        if self.init_r > limit:
            return Fault(("init_r",), f"rank init_r must be at most {limit} here, got {self.init_r}")
        if self.target_r > self.init_r:
            return Fault(
                ("target_r",), f"target_r must be at most init_r ({self.init_r}), got {self.target_r}"
            )
        return super().refuses_to_train(site)

    def params(self, site: WeightSite) -> dict[str, Param]:
        """P (out, r) and Q (r, in) normal, e (r, 1) zero; r of the `init_r` ranks are not pruned."""
        r = sum(self.rank_pattern.get(_key(site.pattern), (True,) * self.init_r))
        return {
            "Q": Param((r, site.in_features), "normal", "lora_A"),
            "P": Param((site.out_features, r), "normal", "lora_B"),
            "e": Param((r, 1), "zeros", "lora_E"),
        }

    def weight(self, W: Tensor, *, P: Tensor, e: Tensor, Q: Tensor) -> Tensor:
        """W + (alpha / init_r) P diag(e) Q, of shape (out, in)."""
        return W + self.alpha / (self.init_r + 1e-5) * (P @ (e * Q))  # as PEFT divides

    def rule(self, sites: Sequence[Mapping[str, Tensor]], steps: int | None) -> TrainingRule | None:
        """Prunes ranks by their sensitivity, and adds the penalty."""
        total = steps or self.total_step
        if total is None:
            raise ValueError("its ranks follow a schedule: say how many `steps` the training has")
        if self.tinit >= total - self.tfinal:
            raise ValueError(
                f"tinit {self.tinit} and tfinal {self.tfinal} leave none of {total} steps to prune ranks"
            )
        return _Allocator(self, sites, total)

    def compact(self, sites: Mapping[str, dict[str, Tensor]]) -> tuple[Self, Mapping[str, dict[str, Tensor]]]:
        """Without the ranks whose e is zero; before training every e is zero, and nothing is pruned.

        Returns:
            the method with its `rank_pattern`; site -> name -> tensor.
        """
        remaining = {
            name: (theta["e"] != 0).flatten() for name, theta in sites.items() if theta["e"].dim() == 2
        }
        trained = any(bool(mask.any()) for mask in remaining.values())
        if not trained or all(bool(mask.all()) for mask in remaining.values()):
            return self, sites
        pattern, smaller = dict(self.rank_pattern), dict(sites)
        for name, mask in remaining.items():
            theta, old = sites[name], pattern.get(_key(name), (True,) * self.init_r)
            flags = iter(mask)
            pattern[_key(name)] = tuple(present and bool(next(flags)) for present in old)
            smaller[name] = {"Q": theta["Q"][mask], "P": theta["P"][:, mask], "e": theta["e"][mask]}
        return replace(self, rank_pattern=pattern), smaller


def _key(site: str) -> str:
    """PEFT's name for a layer in `rank_pattern`."""
    return f"{site}.lora_E"


class _Allocator(TrainingRule):
    """Prunes the ranks of the lowest score: smoothed sensitivity |w · gradient| times its smoothed uncertainty."""

    def __init__(self, method: Adalora, sites: Sequence[Mapping[str, Tensor]], total: int):
        self.method, self.sites, self.total = method, sites, total
        tensors = [site[name] for site in sites for name in "PeQ"]
        self.mean = {id(tensor): tensor.new_zeros(tensor.shape) for tensor in tensors}
        self.uncertainty = {id(tensor): tensor.new_zeros(tensor.shape) for tensor in tensors}
        self.ranks = sum(len(site["e"]) for site in sites)
        self.pruned: list[Tensor] = []

    def penalty(self) -> Tensor:
        """`orth_reg_weight` times the mean of ‖PᵀP - I‖ and ‖QQᵀ - I‖ over all P and Q."""
        import torch

        grams = [gram for site in self.sites for gram in (site["Q"] @ site["Q"].mT, site["P"].mT @ site["P"])]
        each = [norm(gram - torch.eye(gram.shape[-1]).to(gram)) for gram in grams]
        return self.method.orth_reg_weight * torch.stack(each).mean()

    def after(self, number: int) -> None:
        """Follow the sensitivities, and prune when the schedule says so."""
        method, last = self.method, self.total - self.method.tfinal
        if number < last:
            self._follow()
        if number == last or (method.tinit < number < last and number % method.deltaT == 0):
            self._prune(self._ranks_after(number))
        if number >= last:
            for site, mask in zip(self.sites, self.pruned, strict=True):
                site["e"].masked_fill_(mask, 0.0)

    def _ranks_after(self, number: int) -> int:
        """How many ranks of all layers remain after a step."""
        target = self.method.target_r * len(self.sites)
        share = 1 - (number - self.method.tinit) / (self.total - self.method.tfinal - self.method.tinit)
        return int((self.ranks - target) * share**3 + target)

    def _follow(self) -> None:
        for tensor in (site[name] for site in self.sites for name in "PeQ"):
            if tensor.grad is not None:
                now = (tensor * tensor.grad).abs()
                mean, uncertainty = self.mean[id(tensor)], self.uncertainty[id(tensor)]
                mean.lerp_(now, 1 - self.method.beta1)
                uncertainty.lerp_((now - mean).abs(), 1 - self.method.beta2)

    def _prune(self, remaining: int) -> None:
        import torch

        scores = [self._score(site) for site in self.sites]
        lowest = self.ranks - remaining
        bound = torch.cat([s.flatten() for s in scores]).kthvalue(lowest)[0] if lowest > 0 else float("-inf")
        self.pruned = [(score <= bound).unsqueeze(-1) for score in scores]
        for site, mask in zip(self.sites, self.pruned, strict=True):
            site["e"].masked_fill_(mask, 0.0)

    def _score(self, site: Mapping[str, Tensor]) -> Tensor:
        products = {name: self.mean[id(site[name])] * self.uncertainty[id(site[name])] for name in "PeQ"}
        return products["e"].squeeze(-1) + products["Q"].mean(-1) + products["P"].mean(-2)
