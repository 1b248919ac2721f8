"""Evaluation and training in one graph: what follows the mode, and what cannot."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from adaptc.errors import TraceError
from tests.families import perturb, randomise
from tests.small_models import LORA, Calls, Normed, compiled, near


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(x)[0][:, -1])


def test_an_lstm_with_a_dynamic_batch_has_a_trainable_module() -> None:
    made = compiled(
        randomise(Recurrent()), [{"method": "lora", "target": "head", "r": 2}], torch.randn(4, 7, 6)
    )
    perturb(made.module)
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


@pytest.mark.parametrize("model", [Swapped, Ordered])
def test_another_wiring_in_training_is_an_error(model: type[nn.Module]) -> None:
    made = compiled(randomise(model()), [{"method": "lora", "target": "*", "r": 2}], torch.randn(4, 6))
    with pytest.raises(TraceError, match=r"differently in training|in training only"):
        _ = made.module


def test_submodules_keep_their_own_mode() -> None:
    model = Normed()
    model.norm.eval()
    compiled(model, [{"method": "lora", "target": "up", "r": 2}], torch.randn(4, 6)).fold()
    assert model.training
    assert not model.norm.training


def test_a_batch_norm_that_two_branches_share_follows_the_mode() -> None:
    model = Calls(
        lambda m, x: m.norm(m.l(x)) - m.norm(m.l(2 * x)).tanh(), l=nn.Linear(6, 8), norm=nn.BatchNorm1d(8)
    )
    x = torch.randn(4, 6)
    module = compiled(model, [{**LORA, "target": "l"}], x).module.train()
    model.train()
    assert near(module(x), model(x))
    assert near(module.get_buffer("norm.running_mean"), model.get_buffer("norm.running_mean"))
    assert int(module.get_buffer("norm.num_batches_tracked")) == 2


class Angled(nn.Module):
    """Reads a buffer in a region without gradients that writes to a part of what it computes, as Qwen3-VL does."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 6), nn.Linear(6, 3)
        self.frequencies = nn.Buffer(torch.linspace(0.1, 1, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            angles = x.detach().abs() * self.frequencies
            angles[..., ::2] = angles[..., 1::2].sin()
        return self.down(self.up(x) * angles)


def test_a_buffer_read_where_something_is_written_without_gradients() -> None:
    made = compiled(randomise(Angled()), [{"method": "lora", "target": "*", "r": 2}], torch.randn(4, 6))
    perturb(made.module)
    x = torch.randn(2, 6)
    assert near(made.fold()(x), made.module.eval()(x))
