"""AdaLoRA: adaptive budget allocation for low-rank adaptation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import Field

from adaptc.errors import Fault
from adaptc.methods.method import Alpha, Dropout, Rank, WeightMethod, method
from adaptc.methods.param import Param
from adaptc.methods.peft_format import PeftFormat
from adaptc.methods.site import MATRIX_KINDS
from adaptc.methods.training_rule import TrainingRule

if TYPE_CHECKING:
    from torch import Tensor

    from adaptc.methods.site import WeightSite

Steps = Annotated[int, Field(ge=0)]
Decay = Annotated[float, Field(gt=0, lt=1)]
Kept = Annotated[
    Mapping[str, tuple[bool, ...]], Field(description="which ranks of a layer are left, by PEFT's names")
]


class AdaloraFormat(PeftFormat["Adalora"]):
    """PEFT's configuration of AdaLoRA."""

    def write(self, options: dict[str, Any]) -> dict[str, Any]:
        """PEFT reads no configuration without a number of steps that leaves some for its schedule."""
        total = options["total_step"] or options["tinit"] + options["tfinal"] + 1
        return options | {"total_step": total, "rank_pattern": options["rank_pattern"] or None}

    def read(self, options: dict[str, Any]) -> dict[str, Any]:
        """PEFT writes null for no pattern."""
        return options | {"rank_pattern": options.get("rank_pattern") or {}}


@method("adalora")
@dataclass(frozen=True)
class Adalora(WeightMethod):
    """W' = W + (alpha / init_r) P diag(e) Q        P (out, r)   e (r, 1)   Q (r, in)

    Zhang et al. 2023: a singular value decomposition, held near one by the penalty `orth_reg_weight` (‖PᵀP - I‖ +
    ‖QQᵀ - I‖) (equation 4). From `init_r` ranks a layer, the least sensitive of all layers are given up (equations 8
    to 10) until `target_r` a layer are left: none for `tinit` steps, then cubically fewer, every `deltaT` steps, for
    the last `tfinal` none any more (equation 12). `adaptc.TrainingStep` does so; ranks given up are in no checkpoint.
    e starts at zero.
    """

    init_r: Rank = 12
    target_r: Rank = 8
    alpha: Alpha = 8.0
    dropout: Dropout = 0.0
    tinit: Steps = 0
    tfinal: Steps = 0
    deltaT: Rank = 1  # noqa: N815 (the paper's spelling)
    beta1: Decay = 0.85
    beta2: Decay = 0.85
    orth_reg_weight: Annotated[float, Field(ge=0)] = 0.5
    total_step: Rank | None = None
    rank_pattern: Kept = field(default_factory=dict)

    kinds: ClassVar[frozenset[str]] = MATRIX_KINDS
    small: ClassVar[Mapping[str, object]] = {"init_r": 4, "target_r": 2}
    aliases: ClassVar[Mapping[str, str]] = {"lora_alpha": "alpha", "lora_dropout": "dropout"}
    peft: ClassVar[PeftFormat[Any] | None] = AdaloraFormat(
        "ADALORA",
        options={
            "alpha": "lora_alpha",
            "dropout": "lora_dropout",
            **{name: name for name in ("init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2")},
            **{name: name for name in ("orth_reg_weight", "total_step", "rank_pattern")},
        },
        ignored=frozenset(
            {"r", "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying"}
        ),
        layers=frozenset({"Linear", "Conv1D", "Conv2d"}),
    )

    while_training: ClassVar[frozenset[str]] = frozenset(
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
        """A rank above the smaller side adds parameters and no freedom; the budget shrinks."""
        limit = min(site.in_features, site.out_features)
        if self.init_r > limit:
            return Fault(("init_r",), f"rank init_r must be at most {limit} here, got {self.init_r}")
        if self.target_r > self.init_r:
            return Fault(
                ("target_r",), f"target_r must be at most init_r ({self.init_r}), got {self.target_r}"
            )
        return super().refuses_to_train(site)

    def params(self, site: WeightSite) -> dict[str, Param]:
        """P (out, r) and Q (r, in) normal, e (r, 1) zero; r is what is left of `init_r`."""
        r = sum(self.rank_pattern.get(_key(site.pattern), (True,) * self.init_r))
        return {
            "Q": Param((r, site.in_features), "normal", "lora_A"),
            "P": Param((site.out_features, r), "normal", "lora_B"),
            "e": Param((r, 1), "zeros", "lora_E"),
        }

    def weight(self, W: Tensor, *, P: Tensor, e: Tensor, Q: Tensor) -> Tensor:
        """W + (alpha / init_r) P diag(e) Q, of shape (out, in)."""
        return W + self.alpha / (self.init_r + 1e-5) * (P @ (e * Q))  # PEFT's division, which cannot fail

    def rule(self, sites: Sequence[Mapping[str, Tensor]], steps: int | None) -> TrainingRule | None:
        """The rank allocator."""
        total = steps or self.total_step
        if total is None:
            raise ValueError("its ranks follow a schedule: say how many `steps` the training has")
        if self.tinit >= total - self.tfinal:
            raise ValueError(
                f"tinit {self.tinit} and tfinal {self.tfinal} leave none of {total} steps to give up ranks"
            )
        return _Allocator(self, sites, total)

    def compact(self, sites: Mapping[str, dict[str, Tensor]]) -> tuple[Self, Mapping[str, dict[str, Tensor]]]:
        """Without the ranks whose e is zero, if any was trained at all."""
        left = {name: (theta["e"] != 0).flatten() for name, theta in sites.items() if theta["e"].dim() == 2}
        trained = any(bool(kept.any()) for kept in left.values())
        if not trained or all(bool(kept.all()) for kept in left.values()):
            return self, sites
        pattern, smaller = dict(self.rank_pattern), dict(sites)
        for name, kept in left.items():
            theta, old = sites[name], pattern.get(_key(name), (True,) * self.init_r)
            flags = iter(kept.tolist())
            pattern[_key(name)] = tuple(was and next(flags) for was in old)
            smaller[name] = {"Q": theta["Q"][kept], "P": theta["P"][:, kept], "e": theta["e"][kept]}
        return replace(self, rank_pattern=pattern), smaller


def _key(site: str) -> str:
    """PEFT's name for a layer in `rank_pattern`."""
    return f"{site}.lora_E"


class _Allocator(TrainingRule):
    """Sensitivity |w · gradient|, smoothed, times its smoothed uncertainty, decides which ranks are given up."""

    def __init__(self, method: Adalora, sites: Sequence[Mapping[str, Tensor]], total: int):
        self.method, self.sites, self.total = method, sites, total
        tensors = [site[name] for site in sites for name in "PeQ"]
        self.mean = {id(tensor): tensor.new_zeros(tensor.shape) for tensor in tensors}
        self.doubt = {id(tensor): tensor.new_zeros(tensor.shape) for tensor in tensors}
        self.ranks = sum(len(site["e"]) for site in sites)
        self.given_up: list[Tensor] = []

    def penalty(self) -> Tensor:
        """The mean over all P and Q of ‖PᵀP - I‖ and ‖QQᵀ - I‖, weighed."""
        import torch

        grams = [gram for site in self.sites for gram in (site["Q"] @ site["Q"].mT, site["P"].mT @ site["P"])]
        each = [(gram - torch.eye(gram.shape[-1]).to(gram)).norm() for gram in grams]
        return self.method.orth_reg_weight * torch.stack(each).mean()

    def after(self, number: int) -> None:
        """Follow the sensitivities, and give up ranks when it is time."""
        method, last = self.method, self.total - self.method.tfinal
        if number < last:
            self._follow()
        if number == last or (method.tinit < number < last and number % method.deltaT == 0):
            self._give_up(self._budget(number))
        if number >= last:
            for site, lost in zip(self.sites, self.given_up, strict=True):
                site["e"].masked_fill_(lost, 0.0)

    def _budget(self, number: int) -> int:
        target = self.method.target_r * len(self.sites)
        left = 1 - (number - self.method.tinit) / (self.total - self.method.tfinal - self.method.tinit)
        return int((self.ranks - target) * left**3 + target)

    def _follow(self) -> None:
        for tensor in (site[name] for site in self.sites for name in "PeQ"):
            if tensor.grad is not None:
                now, mean, doubt = (tensor * tensor.grad).abs(), self.mean[id(tensor)], self.doubt[id(tensor)]
                mean.lerp_(now, 1 - self.method.beta1)
                doubt.lerp_((now - mean).abs(), 1 - self.method.beta2)

    def _give_up(self, budget: int) -> None:
        import torch

        scores = [self._score(site) for site in self.sites]
        lowest = self.ranks - budget
        bound = torch.cat([s.flatten() for s in scores]).kthvalue(lowest)[0] if lowest > 0 else float("-inf")
        self.given_up = [(score <= bound).unsqueeze(-1) for score in scores]
        for site, lost in zip(self.sites, self.given_up, strict=True):
            site["e"].masked_fill_(lost, 0.0)

    def _score(self, site: Mapping[str, Tensor]) -> Tensor:
        weighed = {name: self.mean[id(site[name])] * self.doubt[id(site[name])] for name in "PeQ"}
        return weighed["e"].squeeze(-1) + weighed["Q"].mean(-1) + weighed["P"].mean(-2)
