"""What is emitted does not depend on what was read before: a stored adapter is folded in its own dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import adaptc
from adaptc.compiler.compiled import Compiled
from adaptc.compiler.plan.adapter_weights import put_weight
from adaptc.methods.method import METHODS
from tests.families import Zoo, differs, entry, perturbed
from tests.laws.test_methods import insert, one, skip_without_site

QUICK = ("lora", "prefix")
"""One of each kind."""
EVERY = [pytest.param(m, marks=[pytest.mark.slow] * (m not in QUICK)) for m in METHODS]


def compiled_in_bfloat16(zoo: Zoo, method: str) -> Compiled:
    """A bfloat16 base with an adapter that is stored in float32, as PEFT trains them."""
    skip_without_site(zoo, method, one(method))
    if insert(method, one(method)).method.calibrated:
        pytest.skip(f"{method} chooses by data, whose gradients bfloat16 rounds")
    if method == "vblora":
        pytest.skip("bfloat16 makes logits equal, and which of two equals topk takes is not told")
    if one(method) == "block":
        compiled = adaptc.compile(
            {"adapt": [entry(method, "block")]},
            model=zoo.fresh("block").to(torch.bfloat16),
            example_inputs=(torch.randn(3, 11, 32, dtype=torch.bfloat16), torch.ones(3, 11)),
            dynamic=zoo.dynamic("block"),
        )
    else:
        base = zoo.base_of(one(method), dtype="bfloat16")
        compiled = adaptc.compile({"base": base, "adapt": [entry(method, one(method))]})
    graph = compiled.graph
    stored = {n: graph.weights[n].exact() for n, param in graph.inserted.items() if param.stored}
    wide = {n: v.float() if v.dtype.is_floating_point else v for n, v in stored.items()}
    for name, value in perturbed(wide).items():
        put_weight(graph.weights[name], lambda value=value: value)
    return compiled


def written(compiled: Compiled) -> dict[str, torch.Tensor]:
    """Every tensor that artifacts would hold: folded, live, and of the adapter alone."""
    graphs = {"folded": compiled.folded_graph(), "live": compiled.live_graph()}
    tensors = {
        f"{kind} {name}": weight.load() for kind, g in graphs.items() for name, weight in g.weights.items()
    }
    return tensors | {f"adapter {name}": tensor for name, tensor in compiled.program.tensors().items()}


def train_nothing(compiled: Compiled) -> None:
    """A training step with a rate of zero."""
    trained = [p for p in compiled.module.parameters() if p.requires_grad and p.dtype.is_floating_point]
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(trained, lr=0.0).step()


@pytest.mark.parametrize("method", EVERY)
def test_reading_changes_nothing_that_is_written(zoo: Zoo, method: str) -> None:
    compiled = compiled_in_bfloat16(zoo, method)
    before = written(compiled)
    adapter = {n: t for n, t in before.items() if n.startswith("adapter") and t.dtype.is_floating_point}
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    for read in (
        lambda c: c.module,
        lambda c: c.fold(),
        lambda c: c.inference(),
        lambda c: c.plan,
        train_nothing,
    ):
        read(compiled)
        after = written(compiled)
        assert after.keys() == before.keys()
        changed = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
        assert not changed


@pytest.mark.parametrize("method", ["lora", pytest.param("prefix", marks=pytest.mark.slow)])
def test_what_is_trained_is_written(zoo: Zoo, method: str) -> None:
    compiled = compiled_in_bfloat16(zoo, method)
    before = written(compiled)
    with torch.no_grad():
        for parameter in compiled.module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5)
    after = written(compiled)
    for name in (n for n in before if n.startswith("adapter")):
        differs(after[name].float(), before[name].float())


def test_a_checkpoint_loaded_later_is_folded_in_its_own_dtype(zoo: Zoo, tmp_path: Path) -> None:
    first = compiled_in_bfloat16(zoo, "lora")
    first.save_adapter(tmp_path)
    second: Any = compiled_in_bfloat16(zoo, "lora")
    second.load_adapter(tmp_path)
    want, got = written(first), written(second)
    assert not [name for name, tensor in want.items() if not torch.equal(tensor, got[name])]
