"""Adapters that compensate for what quantization loses (LoftQ)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adaptc.compiler.compiled import Compiled
from tests.families import Zoo, close, inputs, outputs, perturb, scheme_entry

# adapters that make up for what is lost

MAKES_UP = {"lora": {"r": 4, "alpha": 4}, "qalora": {"r": 4, "alpha": 4, "group_size": 4}}


def compensation(zoo: Zoo, method: str, scheme: str = "int4", **more: Any) -> Compiled:
    entry = {"method": method, "target": ["up", "down"], **MAKES_UP[method], **more}
    quantize = {**scheme_entry(scheme), "target": ["up", "down"]}
    return zoo.compiled("mlp", [entry], quantize=[quantize])


def left(made: Compiled) -> float:
    """How far the weights are, adapters and all, from the float model's."""
    errors = made.quantization_errors()
    assert errors is not None
    return sum(layer.weight**2 for layer in errors.layers) ** 0.5


@pytest.mark.parametrize("scheme", ["int4", "nf4", "int2"])
@pytest.mark.parametrize("method", MAKES_UP)
def test_adapters_that_make_up_for_what_is_lost(zoo: Zoo, method: str, scheme: str) -> None:
    nothing = left(compensation(zoo, method, scheme))
    once = left(compensation(zoo, method, scheme, init_weights="loftq"))
    again = left(compensation(zoo, method, scheme, init_weights="loftq", loftq_iter=5))
    assert once < 0.95 * nothing
    assert again < once


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("method", MAKES_UP)
def test_what_makes_up_is_saved_and_loaded(zoo: Zoo, method: str, rounds: int, tmp_path: Path) -> None:
    """Where the bits are others than the weights' own, the checkpoint says how they were found."""
    made = compensation(zoo, method, init_weights="loftq", loftq_iter=rounds)
    perturb(made.module)
    made.save_adapter(tmp_path / "adapter")
    quantize = [{**scheme_entry("int4"), "target": ["up", "down"]}]
    again = zoo.compiled("mlp", [{"adapter": str(tmp_path / "adapter")}], quantize=quantize)
    tensors = inputs("mlp")
    got, want = (outputs(m.module.eval(), tensors, m.base.outputs)["output"] for m in (again, made))
    close(got, want)
    for name, weight in made.graph.weights.items():
        assert torch.equal(weight.load(), again.graph.weights[name].load()), name
    fresh = compensation(zoo, method, init_weights="loftq", loftq_iter=rounds)
    fresh.load_adapter(tmp_path / "adapter")
    close(outputs(fresh.module.eval(), tensors, made.base.outputs)["output"], want)
    if rounds > 1:
        plain = zoo.compiled("mlp", [], quantize=quantize)
        codes = [m.graph.weights["up.weight_codes"].load() for m in (plain, made)]
        assert not torch.equal(*codes)
