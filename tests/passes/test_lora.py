"""LoRA's dropout, number for number."""

from __future__ import annotations

import torch
from torch.nn import functional as F

import adaptc
from tests.families import close


def test_lora_dropout_is_the_papers() -> None:
    linear = torch.nn.Linear(6, 4)
    model = torch.nn.Sequential()
    model.add_module("layer", linear)

    class One(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = linear

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)

    compiled = adaptc.compile(
        {"adapt": [{"method": "lora", "target": "layer", "r": 2, "alpha": 3, "dropout": 0.4}]},
        model=One(),
        example_inputs=(torch.randn(3, 6),),
        dynamic={"x": {0: "batch"}},
    )
    module = compiled.module.train()
    state = dict(module.named_parameters())
    A, B = state["layer.lora_A.default.weight"], state["layer.lora_B.default.weight"]
    torch.nn.init.normal_(B.data)
    x = torch.randn(7, 6)
    torch.manual_seed(8)
    got = module(x)
    torch.manual_seed(8)
    want = linear(x) + 1.5 * F.dropout(x, 0.4, True) @ A.t() @ B.t()
    close(got, want, 8)
