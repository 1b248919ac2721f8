"""The compile as a straight line: what each step does, what it leaves alone, and what a proof runs."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import adaptc
from adaptc.compiler import driver as compiler
from adaptc.compiler.plan.plan import make_plan
from adaptc.compiler.proof.runners import BatchRunner
from adaptc.compiler.rewrite import rewrite
from adaptc.ir import interpreter as streaming
from adaptc.ir.graph import Graph
from adaptc.spec.spec import load
from tests.families import Zoo, entry, perturb
from tests.test_architecture import CORE, imported, module_name

LORA = {"method": "lora", "target": "*", "r": 2}


def steps(function: Any) -> list[str]:
    """The calls that stand at the start of a function's statements, in order, those in a `with` among them."""
    (body,) = ast.parse(inspect.getsource(function)).body
    assert isinstance(body, ast.FunctionDef)
    statements = [s for each in body.body for s in (each.body if isinstance(each, ast.With) else [each])]
    calls = [statement.value for statement in statements if isinstance(statement, ast.Assign | ast.Expr)]
    return [ast.unparse(call.func) for call in calls if isinstance(call, ast.Call)]


def test_a_plan_is_what_a_compile_starts_with() -> None:
    data = ("calibrate", "take_examples")  # a plan reads none
    done = steps(compiler.plan)
    assert done == [step for step in steps(compiler.compile) if step not in data][: len(done)]
    assert done[-1] == "check_cached"
    assert "program_of(spec, graph)" in inspect.getsource(compiler.plan)


def test_only_the_driver_knows_the_public_face() -> None:
    users = {
        module_name(path)
        for path in CORE
        if "adaptc.compiler.compiled" in {name for name, _ in imported(path, everywhere=True)}
    }
    assert users == {"adaptc", "adaptc.compiler.driver", "adaptc.compiler.adapter_arithmetic"}


def test_a_plan_rewrites_nothing(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = zoo.graph("bert")
    spec = load({"base": zoo.base_of("bert"), "adapt": [entry("lora", "bert")]})
    before = graph.text()
    with monkeypatch.context() as patch:
        patch.setattr(Graph, "copy", lambda self: pytest.fail("a graph was copied to be rewritten"))
        plan = make_plan(spec, graph)
    adapted = rewrite(spec, graph, plan).adapted
    assert graph.text() == before != adapted.text()


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many sweeps over graphs there were, and how many batches modules and programs in memory have run."""
    count = {"sweeps": 0, "calls": 0}
    sweep, one = streaming._sweep, BatchRunner._one

    def swept(*args: Any) -> Any:
        count["sweeps"] += 1
        return sweep(*args)

    def called(self: BatchRunner, batch: Any) -> Any:
        count["calls"] += 1
        return one(self, batch)

    monkeypatch.setattr(streaming, "_sweep", swept)
    monkeypatch.setattr(BatchRunner, "_one", called)
    return count


def test_what_an_artifact_runs(zoo: Zoo, tmp_path: Path, runs: dict[str, int]) -> None:
    """The live graph, the merged one and the file once each: the merged run is what the file is held against, and
    what the manifest keeps. The base ran for the first batch when the module was made, to see that adapters show."""
    compiled = zoo.compiled("mlp", [entry("lora", "mlp")])
    perturb(compiled.module)
    runs.update(sweeps=0, calls=0)
    compiled.emit("onnx", tmp_path / "m.onnx")
    assert runs == {"sweeps": 2, "calls": len(compiled.program.proofs.batches)}


def test_an_untrained_adapter_is_proved_with_random_ones_once(
    zoo: Zoo, tmp_path: Path, runs: dict[str, int]
) -> None:
    """The live graph, the merged one, and the base once, to see that adapters show; then both with random ones."""
    compiled = zoo.compiled("mlp", [entry("lora", "mlp")])
    compiled.emit("onnx", tmp_path / "a.onnx")
    assert runs["sweeps"] == 3 + 2
    compiled.emit("onnx", tmp_path / "b.onnx")
    assert runs["sweeps"] == 3 + 2 + 2, "it was proved with random adapters already"


class Labelled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = self.second(torch.relu(self.first(x)))
        return F.cross_entropy(scores, labels), scores


def test_a_program_that_rounds_is_proved_without_the_labels_it_drops(tmp_path: Path) -> None:
    spec = {
        "inputs": {"x": "float32[batch, 32]", "labels": "int64[batch]"},
        "adapt": [{**LORA, "target": "second"}],
        "quantize": [{"method": "int4", "target": "first"}],
    }
    torch.manual_seed(0)
    compiled = adaptc.compile(spec, model=Labelled())
    compiled.emit("onnx", tmp_path / "m.onnx", adapters="live", round_activations=True)
    assert any("rounds activations" in proof.name for proof in compiled.proofs)
