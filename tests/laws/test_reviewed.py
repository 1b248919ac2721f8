"""What a review found wrong once: each a small model where a mistake would be silent."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import adaptc
from adaptc.emit.onnx.runtime import onnx_runner
from adaptc.errors import ProofError, TraceError
from tests.families import close, differs, perturb


def compiled(model: nn.Module, adapt: list[dict[str, Any]], x: torch.Tensor, **axes: Any) -> adaptc.Compiled:
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.5)
    return adaptc.compile(
        {"adapt": adapt}, model=model, example_inputs=(x,), dynamic={"x": {0: "batch", **axes}}
    )


def disturb(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.3 * torch.randn_like(parameter))


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= 512 * torch.finfo(a.dtype).eps * b.abs().max())


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.relu(self.norm(self.up(x))))


def test_what_batch_norm_learned_is_in_every_product(tmp_path: Path) -> None:
    made = compiled(Normed(), [{"method": "lora", "target": "up", "r": 2}], torch.randn(4, 6))
    module = made.module.train()
    for _ in range(5):
        module(3 + torch.randn(16, 6))
    x = torch.randn(5, 6)
    expected = module.eval()(x)
    assert near(made.fold()(x), expected)
    for adapters in ("folded", "live"):
        made.emit("onnx", tmp_path / f"{adapters}.onnx", adapters=adapters)
        assert near(onnx_runner(tmp_path / f"{adapters}.onnx")({"x": x})[0], expected.detach())


@pytest.mark.parametrize("product", ["folded", "live", "torch"])
def test_nan_in_an_adapter_stops_every_product(tmp_path: Path, product: str) -> None:
    made = compiled(Normed(), [{"method": "lora", "target": "up", "r": 2}], torch.randn(4, 6))
    made.module.get_parameter("up.lora_A.default.weight").data[0, 0] = float("nan")
    with pytest.raises(ProofError, match=r"up\.lora_A\.default\.weight holds NaN"):
        made.emit("torch", tmp_path / "t") if product == "torch" else made.emit(
            "onnx", tmp_path / "m.onnx", adapters=product
        )
    assert not list(tmp_path.iterdir())


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(x)[0][:, -1])


def test_an_lstm_with_a_dynamic_batch_has_a_trainable_module() -> None:
    made = compiled(Recurrent(), [{"method": "lora", "target": "head", "r": 2}], torch.randn(4, 7, 6))
    disturb(made.module)
    x = torch.randn(2, 7, 6)
    assert near(made.fold()(x), made.module.eval()(x))


class Swapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) if self.training else self.b(x)


class Ordered(Swapped):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.a(x), self.b(x)
        return a - b if self.training else b - a


class Counted(Swapped):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.get_buffer("steps").add_(2)
        return self.b(self.a(x))


@pytest.mark.parametrize("model", [Swapped, Ordered, Counted])
def test_another_wiring_in_training_is_an_error(model: type[nn.Module]) -> None:
    made = compiled(model(), [{"method": "lora", "target": "*", "r": 2}], torch.randn(4, 6))
    with pytest.raises(TraceError, match=r"differently in training|in training only"):
        _ = made.module


class BothWays(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(6, 6)), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(F.linear(x, self.weight)) @ self.weight)


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
    made = compiled(model(), [{"method": method, "target": "*", **options}], torch.randn(4, 6))
    assert "weight" not in [site.parameter for site in made.plan.sites]


class Halved(BothWays):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.addmm(self.head.weight[0], x, self.weight, beta=0.5, alpha=2))


def test_a_scaled_product_is_adapted_as_a_whole() -> None:
    made = compiled(Halved(), [{"method": "lora", "target": "re:", "r": 2}], torch.randn(4, 6))
    perturb(made.module)
    x = torch.randn(4, 6)
    close(made.fold()(x), made.module.eval()(x))
    differs(made.module(x), made.base.source.model(x))


def test_dropout_that_has_no_place_is_refused() -> None:
    entry = {"method": "lora", "target": "re:", "r": 2, "dropout": 0.5}
    with pytest.raises(adaptc.RefusedError, match="has dropout"):
        compiled(Halved(), [entry], torch.randn(4, 6))


class SameTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        y = self.up(x)
        return {"linear": y, "again": y, "x": x, "none": None}


def test_outputs_that_are_one_tensor_keep_their_names(tmp_path: Path) -> None:
    made = compiled(SameTwice(), [{"method": "lora", "target": "up", "r": 2}], torch.randn(4, 6))
    made.emit("onnx", tmp_path / "m.onnx")
    session = onnx_runner(tmp_path / "m.onnx")
    x = torch.randn(3, 6)
    first, second, third = session({"x": x})
    assert torch.equal(first, second)
    assert torch.equal(third, x)
    from adaptc.emit.onnx.runtime import open_session

    names = [value.name for value in open_session(tmp_path / "m.onnx").get_outputs()]
    assert names == ["linear", "again", "x_output"]


def test_a_method_over_a_loaded_adapter_starts_as_what_is_there(tmp_path: Path) -> None:
    x = torch.randn(4, 6)
    first = compiled(Normed(), [{"method": "lora", "target": "up", "r": 2}], x)
    disturb(first.module)
    first.save_adapter(tmp_path / "a")
    expected = first.module.eval()(x)
    adapt = [{"adapter": str(tmp_path / "a")}, {"method": "dora", "name": "second", "target": "up", "r": 2}]
    second = compiled(Normed(), adapt, x)
    assert near(second.module.eval()(x), expected)


@pytest.mark.parametrize("order", [["full", "lora"], ["a", "b"]])
def test_stacked_adapters_come_back_in_order(tmp_path: Path, order: list[str]) -> None:
    x = torch.randn(4, 6)
    lora = {"method": "lora", "target": "up", "r": 2}
    adapt = (
        [lora | {"name": name} for name in order]
        if order == ["a", "b"]
        else [{"method": "full", "target": "up"}, lora]
    )
    first = compiled(Normed(), adapt, x)
    disturb(first.module)
    first.save_adapter(tmp_path / "both")
    again = compiled(Normed(), [{"adapter": str(tmp_path / "both")}], x)
    assert near(again.module.eval()(x), first.module.eval()(x))


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.block = nn.ModuleDict({"fc": nn.Linear(6, 6)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block["fc"](F.relu(self.fc(x)))


def test_a_name_that_ends_another_is_saved_unmistakably(tmp_path: Path) -> None:
    x = torch.randn(4, 6)
    first = compiled(Nested(), [{"method": "lora", "target": "fc", "r": 2}], x)
    disturb(first.module)
    first.save_adapter(tmp_path / "a")
    again = compiled(Nested(), [{"adapter": str(tmp_path / "a")}], x)
    assert [site.module for site in again.plan.sites] == ["fc"]
    assert near(again.module.eval()(x), first.module.eval()(x))


def test_submodules_keep_their_own_mode() -> None:
    model = Normed()
    model.norm.eval()
    compiled(model, [{"method": "lora", "target": "up", "r": 2}], torch.randn(4, 6)).fold()
    assert model.training
    assert not model.norm.training


def test_the_trainable_module_is_proved() -> None:
    made = compiled(Normed(), [{"method": "lora", "target": "up", "r": 2}], torch.randn(4, 6))
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
