"""Which models share a trace in the tests: those alone that are traced alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertModel

from tests.traces import is_plain, traced_alike

SIZES: dict[str, Any] = {
    "vocab_size": 16,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
}


class Scaled(nn.Module):
    def __init__(self, scale: Any = 2.0) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(2, 2), scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.scale


def test_models_that_differ_in_weights_and_place_only(tmp_path: Path) -> None:
    one, other = (tmp_path / name for name in ("one", "other"))
    for directory in (one, other):
        BertModel(BertConfig(**SIZES)).save_pretrained(directory)
    assert traced_alike(BertModel.from_pretrained(one)) == traced_alike(BertModel.from_pretrained(other))
    assert traced_alike(Scaled()) == traced_alike(Scaled())


def test_models_that_compute_something_else() -> None:
    plain = traced_alike(BertModel(BertConfig(**SIZES)))
    for change in ({"hidden_act": "relu"}, {"hidden_dropout_prob": 0.3}, {"layer_norm_eps": 1e-3}):
        assert traced_alike(BertModel(BertConfig(**SIZES | change))) != plain
    assert traced_alike(Scaled(3.0)) != traced_alike(Scaled())
    assert traced_alike(Scaled().double()) != traced_alike(Scaled())
    tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    apart = traced_alike(tied)
    tied[1].weight = tied[0].weight
    assert traced_alike(tied) != apart


def test_models_of_which_not_all_can_be_told() -> None:
    assert is_plain(Scaled())
    assert not is_plain(Scaled(torch.tensor(2.0)))
    assert not is_plain(Scaled(object()))
    hooked = Scaled()
    hooked.linear.register_forward_hook(lambda _, __, output: output + 1)
    assert not is_plain(hooked)
