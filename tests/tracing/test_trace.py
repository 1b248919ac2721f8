"""What a trace keeps of a model, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adaptc.errors import TraceError
from tests.families import Zoo
from tests.small_models import LORA, Calls, compiled


def test_tied_weights_stay_one_tensor(zoo: Zoo) -> None:
    module = zoo.initial("lora", "gpt2").module
    assert module.lm_head.weight is module.transformer.wte.weight


def test_a_model_that_is_random_in_evaluation_is_told_so() -> None:
    model = Calls(lambda m, x: F.dropout(m.l(x), 0.5, True), l=nn.Linear(6, 4))
    with pytest.raises(TraceError, match=r"in evaluation mode gave different outputs(?s:.*)self\.training"):
        compiled(model, [{**LORA, "target": "l"}], torch.randn(3, 6))


def test_a_layer_before_a_fourier_transform_is_trained() -> None:
    model, x = Calls(lambda m, x: torch.fft.fft(m.l(x)).real, l=nn.Linear(6, 8)), torch.randn(3, 6)
    made = compiled(model, [{**LORA, "target": "l"}], x)
    made.check_gradients()


def test_a_compile_leaves_the_parameters_that_forward_writes_to() -> None:
    table = nn.Embedding(9, 6, max_norm=0.1)
    before, x = table.weight.detach().clone(), torch.randint(0, 9, (3, 5))
    model = Calls(lambda m, x: m.l(m.e(x)), e=table, l=nn.Linear(6, 4))
    compiled(model, [{**LORA, "target": "l"}], x).folded_graph()
    assert torch.equal(table.weight, before)
