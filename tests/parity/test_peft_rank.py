"""A rank above the smaller side of a layer: a spec is told that it is of no use, a checkpoint of PEFT's is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import adaptc
from tests.families import close, differs, perturb, randomise

peft = pytest.importorskip("peft")
R = 8


class Gated(nn.Module):
    """A layer behind a gate with one output, as Qwen2-MoE's shared expert has."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.layer = nn.Linear(12, 1), nn.Linear(12, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gate(x).sigmoid() * self.layer(x)


@pytest.mark.parametrize("kind", ["lora", "dora", "loha"])
def test_a_checkpoint_of_such_a_rank_is_what_peft_computes(kind: str, tmp_path: Path) -> None:
    made = peft.LoHaConfig if kind == "loha" else peft.LoraConfig
    options = {"use_dora": True} if kind == "dora" else {}
    base, x = randomise(Gated()), torch.randn(3, 12)
    before = base(x).detach()
    theirs = peft.PeftModel(base, made(r=R, target_modules=["gate", "layer"], **options))
    perturb(theirs)
    theirs.eval().save_pretrained(tmp_path)
    want = theirs(x).detach()
    differs(want, before)
    model = theirs.unload()
    compiled = adaptc.compile(
        {"adapt": [{"adapter": str(tmp_path)}]}, model=model, example_inputs=(x,), dynamic={"x": {0: "batch"}}
    )
    with torch.no_grad():
        close(compiled.module.eval()(x), want)
        close(compiled.fold()(x), want)
        perturb(compiled.module, seed=7)
        compiled.load_adapter(tmp_path)
        close(compiled.module.eval()(x), want)


def test_a_spec_is_told() -> None:
    entry = {"method": "lora", "target": "*", "r": R}
    with pytest.raises(adaptc.SpecError, match="rank r must be at most 1 here, got 8"):
        adaptc.compile({"adapt": [entry]}, model=Gated(), example_inputs=(torch.randn(3, 12),))
