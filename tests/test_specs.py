"""The specs in specs/: each method has one, and the README's own model trains; `tests/replay` compiles them all."""

import shutil
from pathlib import Path

import pytest
import torch

import adaptc
from adaptc.registry import load_methods
from tests.spec_bases import ROOT, SPECS


def test_every_method_has_a_spec() -> None:
    assert {name for name, cls in load_methods().items() if cls.__module__.startswith("adaptc.")} <= {
        p.stem for p in SPECS
    }


def test_the_own_model_of_the_readme_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    compiled = adaptc.compile(ROOT / "specs" / "own-model.yaml")
    module = compiled.module
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=1e-2)
    torch.manual_seed(0)
    x, y = torch.randn(64, 24), torch.randint(0, 5, (64,))
    losses = []
    for _ in range(15):
        loss = torch.nn.functional.cross_entropy(module(x), y)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    shutil.rmtree(tmp_path / "a", ignore_errors=True)
    compiled.save_adapter(tmp_path / "a")
    before = module.eval()(x)
    other = adaptc.compile(ROOT / "specs" / "own-model.yaml")
    other.load_adapter(tmp_path / "a")
    assert torch.equal(other.module.eval()(x), before)
