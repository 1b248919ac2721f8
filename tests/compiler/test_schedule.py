"""The passes that a spec names: their order, their options, and passes of a user's own."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, ClassVar

import pytest
import torch

import adaptc
from adaptc.errors import SpecError
from adaptc.ir.graph import Graph
from adaptc.rewriter.pipeline import PASSES, Pass, graph_pass
from tests.families import Mlp, Zoo, randomise

aten = torch.ops.aten


@pytest.mark.parametrize(
    ("passes", "words"),
    [
        (["fold", "insert"], "fold"),
        (["insert", "fold", "factor"], "factor"),
        (["insert", "factor", "fold"], "fold"),
    ],
)
def test_an_impossible_order_in_a_spec_is_an_error(zoo: Zoo, passes: list[str], words: str) -> None:
    adapt = [{"method": "lora", "target": "up", "r": 2}]
    with pytest.raises(SpecError, match=words):
        zoo.compiled("mlp", adapt, passes=passes)


def test_an_explicit_pipeline_is_run(zoo: Zoo) -> None:
    adapt = [{"method": "lora", "target": "up", "r": 2}]
    compiled = zoo.compiled("mlp", adapt, passes=["insert", {"factor": {"tokens": 64}}])
    assert compiled.plan.pipeline == ["insert-lora", "factor"]
    assert compiled.graph.stage == "factored"
    with pytest.raises(SpecError, match="unknown pass 'fodl'"):
        zoo.compiled("mlp", adapt, passes=["insert", "fodl"])
    with pytest.raises(SpecError, match="tokenz"):
        zoo.compiled("mlp", adapt, passes=["insert", {"factor": {"tokenz": 64}}])
    with pytest.raises(SpecError, match="insert"):
        zoo.compiled("mlp", adapt, passes=[])


def test_a_pass_of_ones_own_works_from_a_spec(zoo: Zoo) -> None:
    @dataclasses.dataclass(frozen=True)
    class ReluToSilu(Pass):
        """Relu becomes silu."""

        changes_results: ClassVar[bool] = True

        def call(self, graph: Graph) -> bool:
            found = [n for n in graph.nodes if n.target is aten.relu.default]
            for node in found:
                node.target = aten.silu.default
            return bool(found)

    graph_pass("relu-to-silu")(ReluToSilu)
    try:
        spec: dict[str, Any] = {
            "adapt": [{"method": "lora", "target": "up", "r": 2}],
            "passes": ["relu-to-silu", "insert"],
        }
        compiled = adaptc.compile(
            spec, model=randomise(Mlp()), example_inputs=(torch.randn(3, 16),), dynamic={"x": {0: "batch"}}
        )
        planned = zoo.compiled("mlp", spec["adapt"], passes=spec["passes"])
    finally:
        PASSES.forget("relu-to-silu")
    assert "aten.silu.default" in compiled.graph.operations
    assert [bool(record.change) for record in compiled.records if record.name == "relu-to-silu"] == [True]
    assert not any(record.change for record in planned.records), "a plan reads no weight"
    (note,) = [note for note in compiled.plan.notes if note.startswith("relu-to-silu")]
    assert re.fullmatch(r"relu-to-silu changes results: outputs differ by up to \S+ of the largest, .*", note)
    assert "aten.relu.default" not in compiled.graph.operations
