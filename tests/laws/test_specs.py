"""The specs in specs/: each method has one, and the README's own model trains; `tests/replay` compiles them all."""

import shutil
from pathlib import Path

import pytest
import torch

import adaptc
from adaptc.compiler.base import make_base
from adaptc.compiler.plan.plan import make_plan
from adaptc.ir.graph import Graph
from adaptc.methods.method import METHODS
from adaptc.spec.spec import load
from adaptc.spec.yaml_text import flow
from adaptc.tracing.trace import trace_base as trace
from tests.spec_bases import ROOT, SPECS, overrides_for

QUICK = ("own-model", "peft-to-huggingface", "peft-to-onnx", "sentiment", "int8")
"""The journeys, and a scheme."""


@pytest.fixture(scope="module")
def traced() -> dict[str, Graph]:
    """The graphs of the bases that specs name, each traced once."""
    return {}


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] * (p.stem not in QUICK)) for p in SPECS],
)
def test_the_pipeline_that_plan_prints_can_be_pasted(
    path: Path, spec_bert: Path, spec_adapter: Path, traced: dict[str, Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    overrides = overrides_for(path, spec_bert, spec_adapter)
    spec = load(path, overrides)
    key = repr((spec.base, spec.inputs))
    if key not in traced:
        traced[key] = trace(make_base(spec))
    plan = make_plan(spec, traced[key])
    printed = flow(plan.stated)
    again = make_plan(load(path, [*overrides, f"passes={printed}"]), traced[key])
    assert [(item.name, item.stated()) for item in again.passes] == [
        (item.name, item.stated()) for item in plan.passes
    ]
    assert len(again.closing) == len(plan.closing)
    assert flow(again.stated) == printed


def test_every_method_has_a_spec() -> None:
    assert {name for name, cls in METHODS.items() if cls.__module__.startswith("adaptc.")} <= {
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
