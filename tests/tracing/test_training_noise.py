"""What a model draws in training only: merged into one graph where it is noise, an error where it is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import adaptc
from adaptc.errors import TraceError
from tests.families import close, differs


class Noisy(nn.Module):
    """Two layers, with something between them in training."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.up(x))
        if self.training:
            h = self.disturb(h, x)
        return self.down(h + 1)

    def disturb(self, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class Jitter(Noisy):
    def disturb(self, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        h *= torch.empty_like(h).uniform_(0.9, 1.1)
        return h


class StochasticDepth(Noisy):
    def disturb(self, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        kept = 0.6 + torch.rand((h.shape[0], 1), dtype=h.dtype, device=h.device)
        return h.div(0.6) * kept.floor_()


class Added(Noisy):
    def disturb(self, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return h + 0.1 * torch.randn_like(h)


class DroppedTwice(Noisy):
    def disturb(self, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(h + 0.1 * torch.randn_like(h), 0.3)


class OfAnother(Noisy):
    def disturb(self, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.rand_like(h) * x.sum(-1, keepdim=True)


class WithAWeight(Noisy):
    def disturb(self, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return h + torch.rand_like(h) * self.up.bias


class WithoutADraw(Noisy):
    def disturb(self, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return 2 * h


class IntoAView(Noisy):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.up(x))
        if self.training:
            h[:, :4] *= torch.rand_like(h[:, :4])
        return self.down(h)


def compiled(model: type[Noisy]) -> tuple[adaptc.Compiled, Noisy]:
    torch.manual_seed(0)
    eager = model()
    made = adaptc.compile(
        {"adapt": [{"method": "lora", "target": "*", "r": 2}]},
        model=eager,
        example_inputs=(torch.randn(4, 6),),
        dynamic={"x": {0: "batch"}},
    )
    return made, eager


@pytest.mark.parametrize(
    "model",
    [
        Jitter,
        *(pytest.param(model, marks=pytest.mark.slow) for model in (StochasticDepth, Added, DroppedTwice)),
    ],
)
def test_noise_follows_the_mode(model: type[Noisy], tmp_path: Path) -> None:
    made, eager = compiled(model)
    made.emit("torch", tmp_path / "saved")
    fast = torch.compile(made.module, fullgraph=True, backend="aot_eager")
    for number, module in enumerate((made.module, adaptc.load(tmp_path / "saved"), fast)):
        for batch in (5, 1):
            x = torch.randn(batch, 6)
            want = eager.eval()(x)
            close(module.eval()(x), want, 8)
            torch.manual_seed(7)
            noisy = eager.train()(x)
            torch.manual_seed(7)
            if number < 2:  # a compiler draws in an order of its own
                close(module.train()(x), noisy, 8)
            differs(module.train()(x), want)
    before = made.module.train()
    loss = before(torch.randn(4, 6)).square().sum()
    loss.backward()
    assert all(p.grad is not None for p in before.parameters() if p.requires_grad)
    assert made.fold().eval()(x).shape == want.shape


@pytest.mark.parametrize("model", [OfAnother, WithAWeight, WithoutADraw, IntoAView])
def test_anything_else_in_training_is_an_error_at_its_line(model: type[Noisy]) -> None:
    made, _ = compiled(model)
    with pytest.raises(TraceError, match=r"differently in training.*\n  at test_training_noise\.py:\d+"):
        _ = made.module
