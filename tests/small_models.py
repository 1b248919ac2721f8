"""Models of a few layers, compiled with LoRA: what single cases are shown on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import adaptc

LORA = {"method": "lora", "r": 2}


class Calls(nn.Module):
    """Some layers, and what is computed with them."""

    def __init__(self, forward: Callable[..., Any], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.call = forward

    def forward(self, x: torch.Tensor) -> Any:
        return self.call(self, x)


def compiled(model: nn.Module, adapt: list[dict[str, Any]], x: torch.Tensor) -> adaptc.Compiled:
    return adaptc.compile({"adapt": adapt}, model=model, example_inputs=(x,), dynamic={"x": {0: "batch"}})


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= 512 * torch.finfo(a.dtype).eps * b.abs().max())


class Words(nn.Module):
    """An embedding, two layers and a head of its own, none a multiple of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up = nn.Embedding(30, 40), nn.Linear(40, 52)
        self.down, self.head = nn.Linear(52, 40, bias=False), nn.Linear(40, 30)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.down(torch.tanh(self.up(self.embed(x)))))


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.relu(self.norm(self.up(x))))


class BothWays(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(6, 6)), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(F.linear(x, self.weight)) @ self.weight)


class Halved(BothWays):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.addmm(self.head.weight[0], x, self.weight, beta=0.5, alpha=2))


def outputs_by_adapter(module: Any, x: torch.Tensor) -> dict[str | None, torch.Tensor]:
    """What a module with alternatives gives with each of them active, and with none (None)."""
    values: dict[str | None, torch.Tensor] = {}
    with torch.no_grad():
        for name in (*module.adapters, None):
            module.set_adapter(name)
            values[name] = module(x)
    return values
