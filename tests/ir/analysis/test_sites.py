"""Which uses of a weight are one site, however a model spells them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import adaptc
from adaptc.emit.onnx.runtime import onnx_runner
from tests.families import close, differs, perturb, perturbed, randomise
from tests.small_models import LORA, BothWays, Calls, Halved, compiled, near


class TwoBiases(BothWays):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.linear(F.linear(x, self.weight, self.one), self.weight, self.two))


@pytest.mark.parametrize("model", [BothWays, TwoBiases])
@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_a_weight_read_in_two_ways_is_no_linear_site(model: type[nn.Module], method: str) -> None:
    options = {"r": 2} if method == "lora" else {}
    made = compiled(randomise(model()), [{"method": method, "target": "*", **options}], torch.randn(4, 6))
    assert "weight" not in [site.parameter for site in made.plan.sites]


def test_a_scaled_product_is_adapted_as_a_whole() -> None:
    made = compiled(randomise(Halved()), [{"method": "lora", "target": "re:", "r": 2}], torch.randn(4, 6))
    perturb(made.module)
    x = torch.randn(4, 6)
    close(made.fold()(x), made.module.eval()(x))
    differs(made.module(x), made.base.source.model(x))


SPELLED: dict[str, tuple[tuple[int, ...], Callable[[Any, torch.Tensor], torch.Tensor]]] = {
    "x @ W.T": ((4, 6), lambda m, x: x @ m.W.T),
    "x @ W.mT": ((4, 6), lambda m, x: x @ m.W.mT),
    "einsum without an arrow": ((6, 4), lambda m, x: torch.einsum("bi,io", x, m.W)),
    "permute(0, 1)": ((6, 6), lambda m, x: F.linear(x, m.W.permute(0, 1))),
    "transpose(0, 0)": ((4, 6), lambda m, x: F.linear(x, m.W.transpose(0, 0))),
}


@pytest.mark.parametrize("name", SPELLED)
@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_a_parameter_is_adapted_however_it_is_turned(name: str, method: str, tmp_path: Path) -> None:
    shape, forward = SPELLED[name]
    model, x = Calls(lambda m, x: forward(m, x).tanh(), W=nn.Parameter(torch.randn(shape))), torch.randn(5, 6)
    rank = {} if method == "ia3" else {"r": 2}
    made = compiled(model, [{"method": method, "target": "W", **rank}], x)
    perturb(made.module)
    want = adaptc.bind(made.graph).eval()(x).detach()
    assert not near(want, model(x))
    made.emit("onnx", tmp_path / "m.onnx")
    for got in (made.module.eval()(x), made.fold()(x), onnx_runner(tmp_path / "m.onnx")({"x": x})[0]):
        assert near(got, want)


def test_a_parameter_without_numbers_is_folded() -> None:
    model = Calls(lambda m, x: m.l(x) + m.none.sum(), l=nn.Linear(6, 4), none=nn.Parameter(torch.empty(0, 4)))
    x = torch.randn(3, 6)
    made = compiled(model, [{**LORA, "target": "l"}], x)
    assert near(made.fold()(x), model(x))


class Rerun(nn.Module):
    """One layer run three times under one name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = torch.tanh(self.layer(x))
        return self.last(x)


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "full"])
def test_a_layer_run_three_times_is_one_site(method: str) -> None:
    model = randomise(Rerun())
    compiled = adaptc.compile(
        {
            "adapt": [
                {"method": method, "target": ["layer", "last"], **({"r": 3} if method[1:] == "ora" else {})}
            ]
        },
        model=model,
        example_inputs=(torch.randn(3, 8),),
        dynamic={"x": {0: "batch"}},
    )
    assert len({a.site.module for a in compiled.graph.adaptations}) == 2
    module = compiled.module.eval()
    with torch.no_grad():
        trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
        for key, value in perturbed(trained).items():
            trained[key].copy_(value)
    x = torch.randn(5, 8)
    folded = compiled.fold()
    twin = Rerun()
    twin.load_state_dict(folded.state_dict())
    with torch.no_grad():
        close(folded(x), module(x))
        close(twin(x), module(x))  # the eager model with the folded weights
        differs(model(x), module(x))
