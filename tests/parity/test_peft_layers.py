"""What a checkpoint's `target_modules`, `layers_to_transform` and `layers_pattern` mean, as PEFT says itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adaptc.checkpoints.adapter import Checkpoint
from adaptc.checkpoints.peft_config import declared
from adaptc.patterns import matches_any

MODULES = (
    "q_proj", "layers.1", "a.b.layers.1", "h.0.attn.q_proj", "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj", "stages.0.blocks.1.q_proj", "stages.1.blocks.0.q_proj",
    "model.layers.1.mlp.experts.0.q_proj", "a.b.1.layers.2.x.layers.1.layers.1",
)  # fmt: skip


@pytest.mark.parametrize("layers", [None, 0, [1], [0, 2], []])
@pytest.mark.parametrize("before", [None, "blocks", "layers", ["blocks", "layers"]])
@pytest.mark.parametrize("named", [["q_proj"], ["layers.1"], ["q_proj", "model.layers.0.self_attn.q_proj"]])
def test_the_modules_are_those_that_peft_would_adapt(layers: Any, before: Any, named: list[str]) -> None:
    peft = pytest.importorskip("peft")
    utilities = pytest.importorskip("peft.tuners.tuners_utils")
    if layers is None and before is not None:
        pytest.skip("PEFT takes no layers_pattern alone")
    config = {"target_modules": named, "layers_to_transform": layers, "layers_pattern": before}
    theirs = peft.LoraConfig(**config)
    ours = declared(Checkpoint(Path("x"), {"peft_type": "LORA", **config}, {})).target
    for module in MODULES:
        want = bool(utilities.check_target_module_exists(theirs, module))
        assert matches_any(ours, module) == want, module
