"""A layer under two names, and two layers with one tensor: what is adapted, and what a fold refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import adaptc
from adaptc.errors import AdaptcError, RefusedError
from tests.families import Zoo, close, differs, inputs, outputs, perturbed, randomise


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_folding_into_a_tied_head_is_refused_and_live_works(zoo: Zoo, method: str, tmp_path: Any) -> None:
    compiled = zoo.compiled("gpt2", [{"method": method, "target": "lm_head"}])
    assert any(
        ("cannot be folded" in note and "wte" in note) or "lm_head" in note for note in compiled.plan.notes
    )
    module = compiled.module.eval()
    assert module.lm_head.weight is module.transformer.wte.weight
    with torch.no_grad():
        trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
        for key, value in perturbed(trained).items():
            trained[key].copy_(value)
    tensors = inputs("gpt2", 2, 5)
    with torch.no_grad():
        got, base = outputs(module, tensors, ["logits"])["logits"], zoo.run_eager("gpt2", tensors)["logits"]
    differs(got, base)
    with pytest.raises(RefusedError, match="embedding"):
        compiled.fold()
    with pytest.raises(AdaptcError):
        compiled.emit("onnx", tmp_path / "model.onnx", adapters="folded")
    assert not (tmp_path / "model.onnx").exists()
    # by hand: the head alone is changed, the embedding is not
    with torch.no_grad():
        twin = zoo.fresh("gpt2")
        hidden = twin.transformer(**tensors, use_cache=False).last_hidden_state
        W, t = twin.lm_head.weight, {n.split(".")[1]: p for n, p in trained.items()}
        match method:
            case "lora":
                W = W + t["lora_B"] @ t["lora_A"]
            case "dora":
                V = W + t["lora_B"] @ t["lora_A"]
                W = (t["lora_magnitude_vector"] / V.norm(dim=1))[:, None] * V
            case "ia3":
                W = t["ia3_l"] * W
        close(got, hidden @ W.t())


class Twice(nn.Module):
    """One layer run twice, and the same layer under a second name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.again = self.layer
        self.last = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.again(torch.tanh(self.layer(torch.tanh(self.layer(x)))))))


def adapt_twice(model: nn.Module, method: str) -> Any:
    return adaptc.compile(
        {"adapt": [{"method": method, "target": "layer"}]},
        model=model,
        example_inputs=(torch.randn(3, 8),),
        dynamic={"x": {0: "batch"}},
    )


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_a_module_with_two_names_is_adapted_under_the_one_written(method: str) -> None:
    model = randomise(Twice())
    module = adapt_twice(model, method).module.eval()
    t = {n.split(".")[1]: p for n, p in module.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for key, value in perturbed(t).items():
            t[key].copy_(value)
        x, W, b = torch.randn(5, 8), model.layer.weight, model.layer.bias
        W1, b1 = (
            (W + t["lora_B"] @ t["lora_A"], b) if method == "lora" else (t["ia3_l"] * W, t["ia3_l"][:, 0] * b)
        )
        h = torch.tanh(F.linear(torch.tanh(F.linear(x, W1, b1)), W1, b1))
        want = model.last(torch.tanh(F.linear(h, W, b)))
        close(module(x), want)
        differs(model(x), want)


def test_a_module_with_two_names_is_refused_by_the_name_written() -> None:
    with pytest.raises(RefusedError, match=r"\blayer\.weight\b"):
        adapt_twice(randomise(Twice()), "lora").fold()


class TwoNames(nn.Module):
    """The same tensor in two layers, both adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.two.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(torch.tanh(self.one(x)))


@pytest.mark.parametrize("target", [["one"], ["two"], ["one", "two"]])
def test_two_layers_with_one_tensor_never_share_a_fold(target: list[str]) -> None:
    model = randomise(TwoNames())
    compiled = adaptc.compile(
        {"adapt": [{"method": "lora", "target": target, "r": 2}]},
        model=model,
        example_inputs=(torch.randn(3, 8),),
        dynamic={"x": {0: "batch"}},
    )
    module = compiled.module.eval()
    assert {a.site.module for a in compiled.graph.adaptations} == set(target)
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for key, value in perturbed(trained).items():
            trained[key].copy_(value)
        x = torch.randn(4, 8)
        W = {}
        for name in ("one", "two"):
            W[name] = model.one.weight
            if name in target:
                state = module.state_dict()
                B, A = state[f"{name}.lora_B.default.weight"], state[f"{name}.lora_A.default.weight"]
                W[name] = W[name] + 8.0 / 2 * B @ A
        want = F.linear(torch.tanh(F.linear(x, W["one"], model.one.bias)), W["two"], model.two.bias)
        close(module(x), want)
    with pytest.raises(RefusedError):
        compiled.fold()
