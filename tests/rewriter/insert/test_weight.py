"""Several methods on one layer, and methods on a mixture of experts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import adaptc
from adaptc.compiler.compiled import Compiled
from adaptc.emit.onnx.runtime import onnx_runner
from tests.families import SHAPES, Zoo, close, differs, entry, inputs, outputs, perturb


@pytest.mark.parametrize("name", ["bert", "gpt2", "raw"])
@pytest.mark.parametrize("order", [("lora", "ia3"), ("ia3", "lora")])
def test_two_methods_on_one_layer_apply_in_order(zoo: Zoo, name: str, order: tuple[str, str]) -> None:
    entries = [entry(method, name) for method in order]
    for given in entries:
        given.pop("feedforward", None)
    compiled = zoo.compiled(name, entries)
    module = compiled.module.eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    state = module.state_dict()
    folded = compiled.fold()
    theirs = folded.state_dict()
    sites = {a.site.module: a.site for a in compiled.graph.adaptations}
    assert len(compiled.graph.adaptations) == 2 * len(sites)
    for site in sites.values():
        W = state[site.parameter].double()
        W = W.t() if site.transposed else W
        A, B, scale = (
            state[f"{site.module}.{leaf}"].double()
            for leaf in ("lora_A.default.weight", "lora_B.default.weight", "ia3_l.default")
        )
        assert scale.shape == (site.out_features, 1)
        delta = 8.0 / 4 * (B @ A)
        W = scale * (W + delta) if order[0] == "lora" else scale * W + delta
        W = W.t() if site.transposed else W
        close(theirs[site.parameter], W.float(), 2)
        if site.bias:
            close(theirs[site.bias], (state[site.bias].double() * scale[:, 0]).float(), 2)
    tensors = inputs(name, 3, 4, pad=True)
    with torch.no_grad():
        want, got = (
            outputs(module, tensors, folded_keys(compiled)),
            outputs(folded, tensors, folded_keys(compiled)),
        )
    for key in want:
        close(got[key], want[key])


def folded_keys(compiled: Compiled) -> tuple[str, ...]:
    return compiled.base.outputs


def test_a_method_that_throws_away_what_an_earlier_one_did_is_an_error_of_the_spec(zoo: Zoo) -> None:
    adapt = [{"method": "lora", "target": "*", "r": 2}, {"method": "full", "target": "down"}]
    with pytest.raises(adaptc.SpecError, match="down"):
        zoo.compiled("mlp", adapt)
    compiled = zoo.compiled("mlp", adapt[::-1])
    assert compiled.fold() is not None


@pytest.mark.slow
def test_the_router_and_the_experts_of_a_mixture_are_adapted_too(zoo: Zoo, tmp_path: Path) -> None:
    adapt = [{"method": "lora", "target": ["*.mlp.gate", "*.experts.*", "*.q_proj"], "r": 2}]
    compiled = zoo.compiled("mixtral", adapt)
    assert {site.kind for site in compiled.plan.sites} == {"linear", "experts"}
    compiled.check_gradients()
    module = compiled.module
    perturb(module)
    module.train()
    tensors = inputs("mixtral", 4, 7)
    loss = outputs(module, tensors, ["logits"])["logits"].square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters() if p.requires_grad)
    folded, program = compiled.fold(), tmp_path / "model.onnx"
    compiled.emit("onnx", program)
    runs = onnx_runner(program)
    for number, (batch, length) in enumerate(SHAPES):
        tensors = inputs("mixtral", batch, length, pad=number == 0, seed=number)
        with torch.no_grad():
            want = outputs(module.eval(), tensors, ["logits"])["logits"]
            close(outputs(folded, tensors, ["logits"])["logits"], want)
            close(runs(tensors)[0], want)
    differs(want, zoo.run_eager("mixtral", tensors)["logits"])
