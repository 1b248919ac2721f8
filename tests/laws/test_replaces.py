"""`replaces` says of a method that what it makes of a weight does not depend on it; it holds for every method."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import adaptc
from adaptc.checkpoints.module_adapters import tensors_of
from adaptc.methods.method import METHODS, WeightMethod
from tests.checkpoints.test_round_trip import entry
from tests.families import marked, perturb

ON_WEIGHTS = sorted(name for name, cls in METHODS.items() if issubclass(cls, WeightMethod))
QUICK = ("lora", *(name for name in ON_WEIGHTS if METHODS[name].replaces))
INPUTS = {"x": torch.arange(12).reshape(3, 4), "labels": torch.arange(12).reshape(3, 4) % 8}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.norm, self.lin = nn.Embedding(32, 8), nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.lin(self.norm(self.emb(x)))
        return {"loss": nn.functional.cross_entropy(y.flatten(0, 1), labels.flatten()), "logits": y}


def targeted(name: str) -> str:
    """The parameter that a method is tried on."""
    kinds: Any = METHODS[name].kinds
    if name == "layernorm":
        return "norm.weight"
    return "lin.weight" if kinds & {"linear", "parameter"} else "emb.weight"


@pytest.mark.parametrize("name", marked(ON_WEIGHTS, QUICK))
def test_what_replaces_a_weight_does_not_depend_on_it(name: str) -> None:
    torch.manual_seed(0)
    parameter = "lin.bias" if name == "bitfit" else targeted(name)
    whole = "parameter" in METHODS[name].kinds
    target = parameter if whole else parameter.rpartition(".")[0]
    module: Any = adaptc.compile(
        {"adapt": [entry(name, target)]},
        model=Model().eval(),
        example_inputs=INPUTS,
        calibration=[INPUTS],
    ).module.eval()
    perturb(module)
    weight = tensors_of(module).get(parameter)
    with torch.no_grad():
        before = module(**INPUTS)["logits"]
        if weight is not None:
            weight.add_(torch.randn_like(weight))
        assert torch.equal(module(**INPUTS)["logits"], before) is METHODS[name].replaces


def test_no_other_method_replaces() -> None:
    assert not [name for name in METHODS if METHODS[name].replaces and name not in ON_WEIGHTS]
