"""The values that a manifest keeps of an artifact's outputs, to prove it again later."""

from __future__ import annotations

import math

import pytest
import torch

from adaptc.compiler.proof import reference

LOWEST = torch.finfo(torch.float32).min


def test_recorded_values_tell_nan_from_zero() -> None:
    kept = reference._sample(torch.tensor([math.nan, 1.0]))
    assert reference._error(torch.tensor([math.nan, 1.0]), kept, "") == 0.0
    assert reference._error(torch.tensor([0.0, 1.0]), kept, "") == math.inf
    kept = reference._sample(torch.tensor([LOWEST, 1.0, 2.0]))
    assert reference._error(torch.tensor([LOWEST, 1.0, -2.0]), kept, "") == 2.0


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 2**24 + 4, 2**24 + 8])
def test_recorded_places_are_within(count: int) -> None:
    places = reference._sampled(count)
    assert int(places[0]) == 0
    assert int(places[-1]) == count - 1
    assert len(places) == min(count, 64)
