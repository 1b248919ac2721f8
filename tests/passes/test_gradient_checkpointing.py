"""Gradient checkpointing: the same gradients, from fewer kept activations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import adaptc
from adaptc.compiler.compiled import Compiled
from adaptc.ir.module import Segment
from adaptc.ir.nodes import CUT
from tests.families import FAMILIES, Zoo, inputs, marked, outputs, perturb

PASSES = ["insert", "gradient-checkpointing"]


def pair(zoo: Zoo, family: str, passes: Any = None, **spec: Any) -> tuple[Compiled, Compiled]:
    adapt = [{"method": "lora", "target": list(FAMILIES[family].target), "r": 2, "dropout": 0.1}]
    plain = zoo.compiled(family, adapt, **spec)
    order = passes or (["quantize", *PASSES] if spec else PASSES)
    again = zoo.compiled(family, adapt, passes=order, **spec)
    perturb(plain.module)
    assert list(again.module.state_dict()) == list(plain.module.state_dict())
    again.module.load_state_dict(plain.module.state_dict())
    return plain, again


def step(
    made: Compiled, family: str, module: Any = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """An output, the gradients, and the numbers that were kept for them, weights not counted."""
    module = (made.module if module is None else module).train()
    held = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    kept: dict[int, int] = {}

    def pack(value: torch.Tensor) -> torch.Tensor:
        place = value.untyped_storage().data_ptr()
        if place not in held:
            kept[place] = value.untyped_storage().nbytes()
        return value

    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        got = outputs(module, inputs(family, 3, 11), made.base.outputs)[FAMILIES[family].output]
    got.square().mean().backward()
    return got, {n: p.grad for n, p in module.named_parameters() if p.grad is not None}, sum(kept.values())


@pytest.mark.parametrize(
    "family",
    marked([f for f in FAMILIES if f not in ("raw", "mixtral", "whisper", "bart")], ("llama",)),
)
def test_the_same_gradients_from_less(zoo: Zoo, family: str) -> None:
    plain, again = pair(zoo, family)
    want, got = step(plain, family), step(again, family)
    assert torch.equal(got[0], want[0]), "dropout draws the same numbers again"
    assert got[1].keys() == want[1].keys()
    assert all(torch.equal(got[1][name], grad) for name, grad in want[1].items())
    learnt, once = (dict(made.module.named_buffers()) for made in (again, plain))
    assert all(torch.equal(learnt[name], buffer) for name, buffer in once.items()), (
        "statistics count a batch once"
    )
    if family in (
        "llama",
        "gpt2",
        "t5",
        "qwen3",
        "mistral",
        "gemma2",
    ):  # others are too small for it to matter
        assert got[2] < 0.6 * want[2]
    assert any(isinstance(part, Segment) for part in again.module.children())


def test_quantized_weights_are_not_kept_either(zoo: Zoo) -> None:
    quantize = [{"method": "nf4", "target": "all-linear", "block_size": 16}]
    plain, again = pair(zoo, "llama", quantize=quantize)
    want, got = step(plain, "llama"), step(again, "llama")
    assert torch.equal(got[0], want[0])
    assert all(torch.equal(got[1][name], grad) for name, grad in want[1].items())
    assert got[2] < 0.6 * want[2]


def test_as_many_segments_as_asked_for(zoo: Zoo) -> None:
    _, again = pair(zoo, "llama", passes=["insert", {"gradient-checkpointing": {"segments": 3}}])
    assert sum(bool(node.meta.get(CUT)) for node in again.graph.nodes) == 2
    assert sum(isinstance(part, Segment) for part in again.module.children()) == 2


@pytest.mark.slow
def test_compiled_by_torch_and_kept_in_an_artifact(zoo: Zoo, tmp_path: Path) -> None:
    plain, again = pair(zoo, "llama")
    want = step(plain, "llama")
    again.module.zero_grad()
    again.emit("torch", tmp_path / "artifact")
    loaded = adaptc.load(tmp_path / "artifact")
    again.module.load_state_dict(plain.module.state_dict())
    got = step(again, "llama", torch.compile(again.module, fullgraph=True, backend="aot_eager"))
    assert len(got[1]) == len(want[1])
    assert any(isinstance(part, Segment) for part in again.module.children()), (
        "tracing leaves them as they were"
    )
    with torch.no_grad():
        tensors = inputs("llama")
        a, b = (outputs(m.eval(), tensors, ["logits"])["logits"] for m in (loaded, again.module))
    assert torch.allclose(a, b, atol=1e-6)
    assert torch.equal(
        outputs(again.fold(), tensors, ["logits"])["logits"].isnan(), torch.zeros_like(a).bool()
    )
