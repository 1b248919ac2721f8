"""Every family beside the ones that the other laws run quickly: traced, adapted, folded, as PEFT merges it."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import adaptc
from adaptc.emit.onnx.runtime import onnx_runner
from adaptc.errors import ProofError
from adaptc.ir.module import bind
from adaptc.rewriter.catalog import load_passes
from adaptc.rewriter.pipeline import run
from tests.families import (
    FAMILIES,
    HUGGING_FACE,
    QUICK,
    SHAPES,
    Zoo,
    close,
    differs,
    inputs,
    marked,
    outputs,
    perturb,
    without_cache,
)

peft = pytest.importorskip("peft")


@pytest.mark.parametrize(
    "name",
    marked((name for name in HUGGING_FACE if name not in QUICK), ("mixtral", "vit", "whisper", "resnet")),
)
def test_a_family_is_traced_adapted_and_folded_as_peft_merges_it(zoo: Zoo, name: str, tmp_path: Path) -> None:
    target = [pattern.removeprefix("*.").replace("*", r"\w*") for pattern in FAMILIES[name].target]
    options = {"r": 4, "lora_alpha": 6, "target_modules": rf"(.*\.)?({'|'.join(target)})"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(zoo.fresh(name), peft.LoraConfig(**options))
    perturb(theirs)
    theirs.save_pretrained(tmp_path)
    compiled = zoo.compiled(name, [{"adapter": str(tmp_path)}])
    live = theirs.eval()
    folded = bind(run(compiled.graph, [load_passes()["fold"]()])).eval()
    base, more = bind(compiled.base).eval(), without_cache(zoo.eager(name))
    for number, (batch, length) in enumerate(SHAPES[:2]):
        tensors = inputs(name, batch, length, pad=number == 0, seed=number)
        with torch.no_grad():
            eager = zoo.run_eager(name, tensors)
            want = outputs(live, tensors, compiled.base.outputs, **more)
            traced = outputs(base, tensors, compiled.base.outputs)
            got = outputs(folded, tensors, compiled.base.outputs)
        for key in want:
            close(traced[key], eager[key], 8)
            close(got[key], want[key])
        differs(want["logits"], eager["logits"])
    merged = theirs.merge_and_unload().state_dict()
    assert list(folded.state_dict()) == list(merged)
    for key, value in folded.state_dict().items():
        close(value, merged[key], 16)


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
