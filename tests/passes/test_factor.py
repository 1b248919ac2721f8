"""What `factor` refuses."""

from __future__ import annotations

import pytest
import torch

import adaptc
from tests.families import randomise
from tests.small_models import Halved, compiled


def test_dropout_that_has_no_place_is_refused() -> None:
    entry = {"method": "lora", "target": "re:", "r": 2, "dropout": 0.5}
    with pytest.raises(adaptc.RefusedError, match="has dropout"):
        compiled(randomise(Halved()), [entry], torch.randn(4, 6))
