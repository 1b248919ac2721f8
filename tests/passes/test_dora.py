"""DoRA where a row of the weight has no length."""

from __future__ import annotations

import torch
from torch import nn

from tests.small_models import Calls, compiled, near


def test_a_row_of_zeros_is_no_nan_in_dora() -> None:
    layer, x = nn.Linear(6, 4), torch.randn(3, 6)
    layer.weight.data[1] = 0.0
    made = compiled(Calls(lambda m, x: m.l(x), l=layer), [{"method": "dora", "target": "l", "r": 2}], x)
    assert near(made.module.eval()(x), layer(x))
    made.check_gradients()
