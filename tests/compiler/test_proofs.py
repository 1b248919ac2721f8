"""What a proof finds, what it lets pass, and what is proved."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import adaptc
from adaptc.compiler.proof.proof import prove
from adaptc.compiler.proof.runners import BatchRunner
from adaptc.errors import ProofError, SpecError
from tests.families import Zoo, randomise
from tests.small_models import LORA, Calls, Normed, compiled, near


def test_the_trainable_module_is_proved() -> None:
    made = compiled(randomise(Normed()), [{"method": "lora", "target": "up", "r": 2}], torch.randn(4, 6))
    _ = made.module
    (proof,) = [proof for proof in made.proofs if proof.name == "trainable module"]
    assert 0 <= proof.relative <= proof.tolerance


def test_a_fold_by_the_specs_own_passes_is_proved_against_what_it_folds() -> None:
    torch.manual_seed(0)
    model = Normed()
    spec = {"adapt": [{"method": "lora", "target": "up", "r": 2}], "passes": ["insert", "fold"]}
    made = adaptc.compile(spec, model=model, example_inputs=(torch.randn(4, 6),), dynamic={"x": {0: "batch"}})
    live = made.live_graph()
    assert live.adaptations
    x = torch.randn(3, 6)
    assert near(made.fold()(x), adaptc.bind(live).eval()(x))
    assert [proof.name for proof in made.proofs] == ["trace", "fold", "fold, random adapters"]


def test_a_wrong_fold_is_stopped_by_the_proof(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    from adaptc.rewriter.expression import Expression

    compiled = zoo.adapted("lora", "mlp")
    right = Expression.evaluate
    monkeypatch.setattr(Expression, "evaluate", lambda self: right(self) * (1 + 1e-3))
    with pytest.raises(adaptc.ProofError, match="fold"):
        compiled.fold()


def against(a: torch.Tensor, b: torch.Tensor) -> Any:
    drawn = {"batch=2": {"x": torch.zeros(2, 2)}, "batch=1": {"x": torch.zeros(1, 2)}}
    return prove(
        "test", BatchRunner(lambda batch: [a]).on(drawn), BatchRunner(lambda batch: [b]).on(drawn), 1e-4
    )


LOWEST = torch.finfo(torch.float32).min


APART = {
    "inf and nan": ([1.0, math.inf], [1.0, math.nan]),
    "inf and -inf": ([1.0, math.inf], [1.0, -math.inf]),
    "nan in both": ([1.0, math.nan], [1.0, math.nan]),
    "beside a mask": ([LOWEST, 1.0, 2.0], [LOWEST, 100.0, -2.0]),
    "a mask that is gone": ([LOWEST, 1.0, 2.0], [0.0, 1.0, 2.0]),
    "a number and a whole one": ([1.0, 2.0], [1, 2]),
    "imaginary parts": ([1 + 1j], [1 - 5j]),
}


@pytest.mark.parametrize("name", APART)
def test_what_is_apart_is_no_proof(name: str) -> None:
    a, b = (torch.tensor(values) for values in APART[name])
    with pytest.raises(adaptc.ProofError):
        against(a, b)


@pytest.mark.parametrize(
    "values", [[LOWEST, 1.0, 2.0], [math.inf, 1.0], [1 + 1j], [3, 4], [True, False], [0.0]]
)
def test_what_is_equal_is_one(values: list[Any]) -> None:
    assert against(torch.tensor(values), torch.tensor(values)).relative == 0.0


def test_both_senses_of_a_boolean_input_are_proved() -> None:
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.yes, self.no = nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
            return torch.where(keep[:, None], self.yes(x), self.no(x))

    made = adaptc.compile(
        {"adapt": [{**LORA, "target": "no"}]},
        model=Either(),
        example_inputs=(torch.randn(3, 6), torch.tensor([True, False, True])),
        dynamic={"x": {0: "batch"}, "keep": {0: "batch"}},
    )
    made.check_gradients()


def test_integers_below_zero_are_inputs() -> None:
    model = Calls(lambda m, x: m.l(x.float().tanh()), l=nn.Linear(6, 4))
    compiled(model, [{**LORA, "target": "l"}], torch.arange(-9, 9).reshape(3, 6)).check_gradients()


class Paths(nn.Module):
    """One live layer, one whose value is not used, one behind a detach, one behind an argmax."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.dead, self.detached, self.index = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.dead(x)
        chosen = torch.nn.functional.one_hot(self.index(x).argmax(-1), 6).to(x.dtype)
        return self.live(x) + self.detached(x).detach() + chosen


@pytest.mark.parametrize("layer", ["dead", "detached", "index"])
def test_a_layer_that_cannot_be_trained_stops_the_compile(layer: str) -> None:
    def compile(target: Any) -> Any:
        return adaptc.compile(
            {"adapt": [{"method": "lora", "target": target, "r": 2}]},
            model=randomise(Paths()),
            example_inputs=(torch.randn(3, 6),),
            dynamic={"x": {0: "batch"}},
        )

    with pytest.raises(SpecError, match=layer):
        compile([layer])
    if layer != "dead":  # beside a good one too; a dead one is no site at all
        with pytest.raises(SpecError, match=layer):
            compile(["live", layer])
    assert compile(["live"]).module is not None


class Experts(nn.Module):
    """Each token goes to one of many experts, most of which a batch does not reach."""

    def __init__(self, experts: int = 16, dead: bool = False) -> None:
        super().__init__()
        self.dead = dead
        self.router = nn.Linear(8, experts)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(experts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = torch.softmax(self.router(x), -1)
        chosen = weight.argmax(-1, keepdim=True)
        kept = weight * torch.zeros_like(weight).scatter(-1, chosen, 1.0)
        if self.dead:
            kept = kept * torch.cat([torch.zeros_like(kept[:, :1]), torch.ones_like(kept[:, 1:])], -1)
        return sum(kept[:, index, None] * expert(x) for index, expert in enumerate(self.experts))  # type: ignore[return-value]


def compiled_experts(dead: bool) -> adaptc.Compiled:
    torch.manual_seed(5)  # where the rarest expert gets one token in 200
    return adaptc.compile(
        {"adapt": [{"method": "lora", "target": "experts.*", "r": 2}]},
        model=Experts(dead=dead),
        example_inputs=(torch.randn(3, 8),),
        dynamic={"x": {0: "batch"}},
    )


def test_an_expert_that_is_seldom_routed_to_still_counts_as_trained() -> None:
    compiled_experts(dead=False).check_gradients()


def test_an_expert_whose_output_is_thrown_away_does_not() -> None:
    with pytest.raises(ProofError, match=r"such as experts\.0\.lora_A\.default\.weight.* 16 random inputs"):
        compiled_experts(dead=True).check_gradients()
