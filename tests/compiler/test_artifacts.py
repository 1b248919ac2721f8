"""What is in every artifact, and what stops all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import adaptc
from adaptc.emit.onnx.runtime import onnx_runner
from adaptc.errors import ProofError
from tests.families import Mlp, perturb, randomise
from tests.small_models import LORA, Calls, Normed, compiled, near


def test_what_batch_norm_learned_is_in_every_product(tmp_path: Path) -> None:
    made = compiled(randomise(Normed()), [{"method": "lora", "target": "up", "r": 2}], torch.randn(4, 6))
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
    made = compiled(randomise(Normed()), [{"method": "lora", "target": "up", "r": 2}], torch.randn(4, 6))
    made.module.get_parameter("up.lora_A.default.weight").data[0, 0] = float("nan")
    with pytest.raises(ProofError, match=r"up\.lora_A\.default\.weight contains NaN"):
        made.emit("torch", tmp_path / "t") if product == "torch" else made.emit(
            "onnx", tmp_path / "m.onnx", adapters=product
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", ["double().float()", "to_empty", "load_state_dict"])
def test_products_follow_a_module_whose_tensors_are_replaced(change: str) -> None:
    def normed(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.down(torch.relu(m.norm(m.up(x))))

    layers = {"up": nn.Linear(6, 8), "norm": nn.BatchNorm1d(8), "down": nn.Linear(8, 3)}
    made = compiled(Calls(normed, **layers), [{**LORA, "target": "up"}], torch.randn(4, 6))
    module = made.module
    if change == "double().float()":
        module.double().float()
    elif change == "to_empty":
        module._apply(torch.clone)
    else:
        module.load_state_dict({k: v.clone() for k, v in module.state_dict().items()}, assign=True)
    perturb(module)
    module.train()
    for _ in range(5):
        module(3 + torch.randn(16, 6))
    x = torch.randn(5, 6)
    assert near(made.fold()(x), module.eval()(x))


class Scaled(nn.Module):
    """A layer whose value is multiplied by zero: on a path, but without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.dead = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.live(x) + 0.0 * self.dead(x)


def test_a_layer_without_effect_stops_the_products(tmp_path: Any) -> None:
    compiled = adaptc.compile(
        {"adapt": [{"method": "lora", "target": ["live", "dead"], "r": 2}]},
        model=randomise(Scaled()),
        example_inputs=(torch.randn(3, 6),),
        dynamic={"x": {0: "batch"}},
    )
    with pytest.raises(adaptc.ProofError, match=r"dead\.lora_"):
        compiled.check_gradients()
    with pytest.raises(adaptc.ProofError, match=r"dead\.lora_"):
        compiled.emit("torch", tmp_path / "trainable")
    assert not (tmp_path / "trainable").exists()


def test_folding_leaves_the_users_model_alone() -> None:
    model = randomise(Mlp()).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    compiled = adaptc.compile(
        {"adapt": [{"method": "lora", "target": "*", "r": 2}]},
        model=model,
        example_inputs=(torch.randn(3, 16),),
        dynamic={"x": {0: "batch"}},
    )
    with torch.no_grad():
        for parameter in compiled.module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    folded = compiled.fold()
    assert not torch.equal(folded.up.weight, before["up.weight"])
    changed = [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])]
    assert not changed
