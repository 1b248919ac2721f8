"""What holds for every pass, and what the runner does not let a pass do."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from adaptc.compiler.follow_training import FollowTraining
from adaptc.compiler.proof.inputs import batches
from adaptc.compiler.proof.proof import prove, randomised, tolerance
from adaptc.emit.onnx.casts import Casts
from adaptc.emit.onnx.decompose import OnnxOperations
from adaptc.emit.onnx.evaluate import Evaluate
from adaptc.emit.onnx.functional import Functional
from adaptc.emit.onnx.rounding import RoundActivations
from adaptc.errors import RefusedError
from adaptc.ir.graph import Graph
from adaptc.ir.interpreter import Interpreter
from adaptc.ir.module import bind
from adaptc.ir.stages import STAGES
from adaptc.rewriter.catalog import load_passes
from adaptc.rewriter.insert.base import Insert
from adaptc.rewriter.pipeline import PassRecord, check_order, run
from adaptc.tracing.export import export
from tests.families import Zoo, inputs, outputs
from tests.pass_cases import Bad, at_stage, default, snapshot

aten = torch.ops.aten


NAMES = tuple(load_passes())


INSERTS = tuple(name for name in NAMES if name.startswith(("insert-", "quantize-")))


OTHERS = tuple(name for name in NAMES if name not in INSERTS)


def skip_without_site(zoo: Zoo, item: Any) -> None:
    if isinstance(item, Insert) and not item.selection(zoo.graph("mlp")).sites:
        pytest.skip(f"{item.name} sits on {sorted(item.method.kinds)}")


@pytest.mark.parametrize("name", NAMES)
def test_nothing_to_do_is_refused_or_changes_nothing(zoo: Zoo, name: str) -> None:
    """No site matches, or no adapter is there."""
    if name == "gradient-checkpointing":
        pytest.skip("there is always something to compute again")
    item = default(name)
    for stage in sorted(item.takes, key=STAGES.index):
        if name in OTHERS and stage != "traced":
            graph = dataclasses.replace(
                zoo.graph("mlp").copy(), stage=stage
            )  # of that stage, without an adapter
        else:
            graph = at_stage(zoo, stage)
        before, records = graph.text(), list[PassRecord]()
        refusals = item.requires(graph.copy())
        if refusals:
            assert all(refusal.reason for refusal in refusals)
            with pytest.raises(RefusedError):
                run(graph, [item])
            continue
        after = run(graph, [item], records)
        assert after.text() == before
        assert [record.modified for record in records] == [False]
        assert records[0].nodes_before == records[0].nodes_after


@pytest.mark.parametrize("name", INSERTS)
def test_a_target_that_matches_nothing_is_refused_by_name(zoo: Zoo, name: str) -> None:
    with pytest.raises(RefusedError, match="nowhere"):
        run(zoo.graph("mlp"), [default(name)])


@pytest.mark.parametrize("name", NAMES)
def test_run_leaves_its_input_alone(zoo: Zoo, name: str) -> None:
    cls = load_passes()[name]
    stage = "traced" if name in INSERTS else min(cls.takes, key=STAGES.index)
    graph, tensors = at_stage(zoo, stage), inputs("mlp", 4)
    if name in ("quantized-products", "dequantize"):
        graph = run(graph, [default("quantize-nf4", target="*")])
    if name == "plain-integers":
        chosen = dataclasses.replace(graph, calibration_rows=[inputs("mlp", 9)])
        graph = run(chosen, [default("quantize-gptq", target="re:up|down"), default("quantized-products")])
    if name == "torch-kernels":  # there are some for bfloat16 only
        bits = [load_passes()["quantize-int8"](target="*"), default("quantized-products")]  # type: ignore[call-arg]
        graph, tensors = run(zoo.graph("mlp", "bfloat16"), bits), {"x": inputs("mlp", 4)["x"].bfloat16()}
    item = default(name, **({"target": "*"} if name in INSERTS else {}))
    skip_without_site(zoo, item)
    before = snapshot(graph)
    with torch.no_grad():
        value = outputs(bind(graph).eval(), tensors, graph.outputs)["output"]
    after = run(graph, [item])
    assert after.text() != graph.text()
    assert snapshot(graph) == before
    with torch.no_grad():
        assert torch.equal(outputs(bind(graph).eval(), tensors, graph.outputs)["output"], value)


@pytest.mark.parametrize("name", NAMES)
def test_a_pass_is_deterministic(zoo: Zoo, name: str) -> None:
    stage = "traced" if name in INSERTS else min(load_passes()[name].takes, key=STAGES.index)
    item = default(name, **({"target": "*"} if name in INSERTS else {}))
    skip_without_site(zoo, item)
    graph = at_stage(zoo, stage)
    assert run(graph, [item]).text() == run(graph, [item]).text()


@pytest.mark.parametrize("name", NAMES)
def test_a_pass_states_its_stages_and_its_name(zoo: Zoo, name: str) -> None:
    cls = load_passes()[name]
    assert cls.name == name
    assert set(cls.takes) <= set(STAGES)
    assert cls.leaves in (*STAGES, None)
    assert (cls.__doc__ or "").strip()
    assert dataclasses.is_dataclass(default(name))
    with pytest.raises(dataclasses.FrozenInstanceError):
        default(name).anything = 1


@pytest.mark.parametrize("name", NAMES)
def test_a_pass_at_the_wrong_stage_says_which_it_takes(zoo: Zoo, name: str) -> None:
    item = default(name)
    for stage in STAGES:
        words = check_order([item], stage)
        if stage in item.takes:
            assert words is None
            continue
        assert words is not None
        assert name in words
        assert stage in words
        graph = dataclasses.replace(zoo.graph("mlp").copy(), stage=stage)
        with pytest.raises(RefusedError) as caught:
            run(graph, [item])
        assert str(caught.value) == words


def keeping(zoo: Zoo) -> dict[str, tuple[Graph, Any]]:
    """A graph on which each shipped pass that keeps results has something to do."""
    nf4 = run(zoo.graph("mlp"), [default("quantize-nf4", target="*")])
    chosen = dataclasses.replace(zoo.graph("mlp"), calibration_rows=[inputs("mlp", 9)])
    gptq = [default("quantize-gptq", target="re:up|down"), default("quantized-products")]
    int8 = [default("quantize-int8", target="*"), default("quantized-products")]
    adapted, traced = at_stage(zoo, "adapted"), zoo.graph("mlp")
    source = traced.source
    return {
        "factor": (adapted, default("factor", tokens=64)),
        "fold": (adapted, default("fold")),
        "gradient-checkpointing": (adapted, default("gradient-checkpointing")),
        "dequantize": (nf4, default("dequantize")),
        "quantized-products": (nf4, default("quantized-products")),
        "plain-integers": (run(chosen, gptq), default("plain-integers")),
        "torch-kernels": (run(zoo.graph("mlp", "bfloat16"), int8), default("torch-kernels")),
        "evaluate": (run(adapted, [default("factor")]), Evaluate()),
        "functional": (run(zoo.graph("mlp"), [InPlace(), Evaluate()]), Functional()),
        "onnx-operations": (run(zoo.graph("mlp"), [Evaluate()]), OnnxOperations()),
        "follow-training": (traced, FollowTraining(export(source.model, source.inputs, training=True))),
        "onnx-casts": (run(zoo.graph("mlp"), [Evaluate(), OnnxOperations()]), Casts()),
    }


class InPlace(Bad):
    """Relu writes to its operand."""

    def call(self, graph: Graph) -> bool:
        for node in [n for n in graph.nodes if n.target is aten.relu.default]:
            node.target = aten.relu_.default
        return True


def test_shipped_passes_keep_results_unless_they_say_otherwise(zoo: Zoo) -> None:
    cases = keeping(zoo)
    quiet = {name for name, cls in load_passes().items() if not cls.changes_results}
    assert quiet <= set(cases), "a pass keeps results, it says: give it a graph to do so on"
    for name, (graph, item) in cases.items():
        assert item.name == name
        assert not item.changes_results
        before = randomised(graph)
        reference = Interpreter(before).on(batches(graph))
        prove(name, reference, Interpreter(run(before, [item])).on(reference.taken), tolerance(graph))
    assert {load_passes()[name].changes_results for name in INSERTS} == {True}
    assert RoundActivations.changes_results
