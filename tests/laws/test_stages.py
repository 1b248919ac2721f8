"""Every stage has a table of what is legal, and a graph that breaks it is refused with the stage's own words."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from adaptc import passes
from adaptc.emit.onnx.casts import Casts
from adaptc.emit.onnx.decompose import OnnxOperations
from adaptc.emit.onnx.evaluate import Evaluate
from adaptc.emit.onnx.functional import Functional
from adaptc.emit.onnx.lower_quantized import OnnxProducts
from adaptc.emit.onnx.quantized_operations import onnx
from adaptc.emit.onnx.rounding import RoundActivations
from adaptc.errors import RefusedError, VerifyError
from adaptc.ir.graph import Graph
from adaptc.ir.nodes import ADAPTATION
from adaptc.ir.stages import REWRITTEN, STAGE_TABLE, STAGES
from adaptc.ir.training_mode import training_node
from adaptc.ir.verify import verify
from adaptc.quantization.operators import DEQUANTIZE, LINEAR
from adaptc.rewriter.pipeline import Pass, run
from tests.families import Zoo

aten = torch.ops.aten
LORA: dict[str, Any] = {"target": "*", "r": 2}


def at(zoo: Zoo, stage: str) -> Graph:
    """A small graph at a stage, brought there by the passes that lead to it; `quantized` is traced besides."""
    way: dict[str, list[Pass]] = {
        "traced": [],
        "adapted": [passes.InsertLora(**LORA)],
        "quantized": [passes.QuantizeInt4(target="up")],
        "factored": [passes.InsertLora(**LORA), passes.Factor()],
        "folded": [passes.InsertLora(**LORA), passes.Fold()],
        "evaluated": [Evaluate()],
        "onnx": [Evaluate(), Functional(), OnnxOperations()],
    }
    return run(zoo.graph("mlp"), way[stage])


def first(graph: Graph, target: Any = aten.linear.default) -> Any:
    return next(node for node in graph.nodes if node.target is target)


def after(graph: Graph, target: Any, *args: Any) -> None:
    """Let what reads the first product read an operation on it."""
    node = first(graph)
    with graph.module.graph.inserting_after(node):
        made = graph.module.graph.call_function(target, (node, *args))
    made.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)


def unmatched_bits(graph: Graph) -> None:
    codes = graph.parameter_node("mid.weight")
    node = first(graph)
    with graph.module.graph.inserting_before(node):
        made = graph.module.graph.call_function(DEQUANTIZE, ([codes], "int8", 4, 4, torch.float32))
    made.meta["val"] = node.args[1].meta["val"]
    node.update_arg(1, made)


def forgotten(graph: Graph) -> None:
    graph.adaptations.clear()


def unread(graph: Graph) -> None:
    name = graph.adapter_names[0]
    node = next(n for n in graph.nodes if n.op == "get_attr" and n.target == name)
    node.replace_all_uses_with(graph.parameter_node(graph.adapter_names[-1]))
    graph.module.graph.erase_node(node)


def twice(graph: Graph) -> None:
    graph.weights["up.weight"] = graph.weights["mid.weight"]


def without_codes(graph: Graph) -> None:
    del graph.weights[graph.quantized["up.weight"].tensors["codes"]]


def marked(graph: Graph) -> None:
    first(graph).meta[ADAPTATION] = dataclasses.replace(
        graph.adaptations[0]
    )  # another one that is just the same


def inserted(graph: Graph) -> None:
    graph.stage = "traced"


def follows(graph: Graph) -> None:
    flag = training_node(graph.module.graph)
    after(graph, aten.dropout.default, 0.5, flag)


def drops(graph: Graph) -> None:
    after(graph, aten.dropout.default, 0.5, True)


def writes(graph: Graph) -> None:
    weight = graph.parameter_node("up.weight")
    node = first(graph)
    with graph.module.graph.inserting_before(node):
        made = graph.module.graph.call_function(aten.mul_.Tensor, (weight, 2.0))
    made.meta["val"] = weight.meta["val"]
    node.update_arg(1, made)


def another_name(graph: Graph) -> None:
    graph.attach("again", graph.weights["up.weight"])
    graph.aliases["again"] = "up.weight"
    next(n for n in graph.nodes if n.target == "up.weight").target = "again"


def unused(graph: Graph) -> None:
    with graph.module.graph.inserting_before(next(iter(graph.nodes))):
        made = graph.module.graph.placeholder("more")
    made.meta["val"] = first(graph).meta["val"]


CASES: list[tuple[str, Callable[[Graph], None], str]] = [
    ("traced", unmatched_bits, "not legal in a graph that is traced: %dequantize"),
    (
        "traced",
        lambda g: after(g, onnx.matmul_integer.default, None, None),
        "not legal in a graph that is traced",
    ),
    ("adapted", inserted, "lora is inserted, and the graph is still traced"),
    ("adapted", unread, "inserted, but not read by any operation: .*lora_"),
    ("adapted", marked, "%linear.* is left of lora on "),
    ("factored", forgotten, "is left of lora on "),
    ("factored", unmatched_bits, "not legal in a graph that is factored"),
    ("quantized", twice, "up.weight is quantized, but its floats are there too"),
    (
        "quantized",
        without_codes,
        "up.weight_codes is read, but there is no weight|up.weight_codes is missing",
    ),
    ("folded", unmatched_bits, "not legal in a graph that is folded"),
    ("evaluated", follows, "follows the module's mode, and the graph only evaluates"),
    ("evaluated", drops, "%dropout.* can drop values"),
    ("evaluated", writes, "%mul__.* changes up.weight in place|%mul_.* changes up.weight in place"),
    ("evaluated", another_name, "again is read, whose tensor is called up.weight"),
    ("evaluated", unused, "the input more is not used"),
    ("onnx", lambda g: after(g, aten.relu_.default), "changes its operand in place"),
    ("onnx", lambda g: after(g, LINEAR, [], None, "int8", 4, 4), "not legal in a graph that is onnx"),
    ("onnx", lambda g: after(g, getattr, "device"), "not a registered operation"),
]


@pytest.mark.parametrize(("stage", "change", "message"), CASES)
def test_what_is_illegal_at_a_stage_is_refused(
    zoo: Zoo, stage: str, change: Callable[[Graph], None], message: str
) -> None:
    graph = at(zoo, stage)
    verify(graph)
    change(graph)
    with pytest.raises(VerifyError, match=message):
        verify(graph)


def test_an_adapter_that_a_fold_left_is_refused(zoo: Zoo) -> None:
    graph = at(zoo, "adapted")
    graph.stage = "folded"
    with pytest.raises(VerifyError, match=r"the folded graph still holds the adapters .*lora_"):
        verify(graph)


def test_every_stage_is_refused_something() -> None:
    assert {stage for stage, _, _ in CASES} == {*STAGES, "quantized"}
    assert set(REWRITTEN) < set(STAGES)
    assert all(stage.holds and stage.laws for stage in STAGE_TABLE.values())


def test_passes_of_a_spec_do_not_start_from_a_program(zoo: Zoo) -> None:
    graph = at(zoo, "evaluated")
    with pytest.raises(RefusedError) as caught:
        run(graph, [passes.Fold()])
    assert str(caught.value) == "fold takes a graph that is adapted, but finds one that is evaluated"
    with pytest.raises(RefusedError) as caught:
        run(graph, [Casts()])
    assert str(caught.value) == "onnx-casts takes a graph that is onnx, but finds one that is evaluated"
    with pytest.raises(RefusedError) as caught:
        run(zoo.graph("mlp"), [RoundActivations()])
    assert (
        str(caught.value) == "round-activations takes a graph that is evaluated, but finds one that is traced"
    )


def test_bits_stand_at_every_stage_beside_its_own_table(zoo: Zoo) -> None:
    """Quantized is no step of the line: a graph is adapted and quantized, folded and quantized, and so on."""
    bits = passes.QuantizeInt4(target="up")
    for way in ([bits, passes.InsertLora(**LORA)], [passes.InsertLora(**LORA), passes.Fold(), bits]):
        graph = run(zoo.graph("mlp"), [*way, passes.QuantizedProducts(), Evaluate()])
        assert graph.state == "evaluated, quantized"
        written = run(graph, [OnnxProducts()])
        assert not re.search(r"adaptc\.(quantized|dequantize)", written.text())
        with pytest.raises(VerifyError, match=r"graph that is onnx: %(dequantize|quantized_linear)"):
            run(graph, [Functional(), OnnxOperations()])
