"""What the runner does not let a pass do, and how it says so."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adaptc.errors import VerifyError, WeightError
from adaptc.ir.graph import Graph
from adaptc.rewriter.pipeline import Pass, run
from adaptc.weights import Held
from tests.families import Zoo
from tests.pass_cases import Bad, default, snapshot

aten = torch.ops.aten


class WrongShape(Bad):
    def call(self, graph: Graph) -> bool:
        node = next(n for n in graph.nodes if n.target is aten.linear.default)
        node.args = (node.args[0], next(n for n in graph.nodes if n.target == "mid.weight"))
        return True


class UnknownOperation(Bad):
    def call(self, graph: Graph) -> bool:
        node = next(n for n in graph.nodes if n.target is aten.linear.default)
        with graph.module.graph.inserting_after(node):
            other = graph.module.graph.call_function(F.relu, (node,))
        node.replace_all_uses_with(other, delete_user_cb=lambda user: user is not other)
        return True


class RemovedWeight(Bad):
    def call(self, graph: Graph) -> bool:
        del graph.weights["up.weight"]
        return True


class OtherDtype(Bad):
    def call(self, graph: Graph) -> bool:
        node = next(n for n in graph.nodes if n.target is aten.linear.default)
        with graph.module.graph.inserting_after(node):
            other = graph.module.graph.call_function(aten.to.dtype, (node, torch.float64))
        other.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(other, delete_user_cb=lambda user: user is not other)
        return True


class WrongWeight(Bad):
    def call(self, graph: Graph) -> bool:
        graph.weights["up.weight"] = Held(torch.zeros(3, 3))
        return True


class CallsAModule(Bad):
    def call(self, graph: Graph) -> bool:
        graph.module.add_module("extra", nn.Identity())
        node = next(n for n in graph.nodes if n.target is aten.linear.default)
        with graph.module.graph.inserting_after(node):
            other = graph.module.graph.call_module("extra", (node,))
        node.replace_all_uses_with(other, delete_user_cb=lambda user: user is not other)
        return True


class Raises(Bad):
    def call(self, graph: Graph) -> bool:
        raise KeyError("mine")


class Unordered(Bad):
    def call(self, graph: Graph) -> bool:
        first, second = [n for n in graph.nodes if n.target is aten.linear.default][:2]
        first.args = (second, *first.args[1:])
        return True


class Forgets(Bad):
    """Leaves an inserted parameter unread."""

    takes = frozenset({"adapted"})

    def call(self, graph: Graph) -> bool:
        for node in graph.nodes:
            if node.target is aten.linear.default:
                node.args = (
                    node.args[0],
                    graph.parameter_node(graph.adaptations[0].site.parameter),
                    *node.args[2:],
                )
                return True
        return False


class SaysNothing(Bad):
    def call(self, graph: Graph) -> bool:
        return None  # type: ignore[return-value]


class Ensures(Bad):
    def call(self, graph: Graph) -> bool:
        return True

    def ensures(self, graph: Graph) -> str | None:
        return "what I promised does not hold"


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (WrongShape, "mid.weight|linear"),
        (UnknownOperation, "relu"),
        (RemovedWeight, "up.weight"),
        (OtherDtype, "float64|records"),
        (WrongWeight, "up.weight"),
        (CallsAModule, "call_module|extra"),
        (Raises, "bad.*mine"),
        (Unordered, "bad|before"),
        (Ensures, "promised"),
        (SaysNothing, "call gives whether it changed anything, True or False; got None"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_bad_pass_is_caught(zoo: Zoo, item: type[Pass], words: str) -> None:
    graph = zoo.graph("mlp")
    before = snapshot(graph)
    with pytest.raises(VerifyError, match=words) as caught:
        run(graph, [item()])
    assert str(caught.value).startswith("pass bad failed (after no other): ")
    assert snapshot(graph) == before


def test_a_failure_names_the_passes_and_shows_the_graph_around_the_node(zoo: Zoo) -> None:
    passes = [default("insert-lora", target="mid", r=2), default("gradient-checkpointing"), WrongShape()]
    with pytest.raises(VerifyError) as caught:
        run(zoo.graph("mlp"), passes)
    first, *rest = str(caught.value).splitlines()
    assert first.startswith("pass bad failed (after insert-lora, gradient-checkpointing): %linear : ")
    assert "does not fit its operands: a and b must have same reduction dim" in first
    assert re.fullmatch(r"  in up, from families\.py:\d+", rest[0])
    assert rest[1] == "  the graph around %linear:"
    shown = rest[2:]
    marked = [line for line in shown if line.startswith("  > ")]
    assert len(marked) == 1
    assert "%linear = aten.linear.default(%x, %mid_weight)" in marked[0]
    assert shown.index(marked[0]) == 5
    assert len(shown) == 11
    assert all(line.startswith("    %") for line in shown if line not in marked)


def test_a_failure_without_a_node_shows_no_graph(zoo: Zoo) -> None:
    with pytest.raises(VerifyError) as caught:
        run(zoo.graph("mlp"), [Ensures()])
    assert str(caught.value) == "pass bad failed (after no other): what I promised does not hold"
    with pytest.raises(VerifyError) as caught:
        run(zoo.graph("mlp"), [Raises()])
    message = str(caught.value).splitlines()
    assert message[0] == "pass bad failed (after no other): KeyError: 'mine'"
    assert re.fullmatch(r'  at .*test_pipeline\.py:\d+    raise KeyError\("mine"\)', message[1])
    assert len(message) == 2


def test_a_node_that_a_pass_names_is_shown(zoo: Zoo) -> None:
    class Promises(Bad):
        def call(self, graph: Graph) -> bool:
            return False

        def ensures(self, graph: Graph) -> str | None:
            return "%relu is left"

    with pytest.raises(
        VerifyError, match=r"%relu is left\n  the graph around %relu:(\n.*)*\n  > %relu = aten.relu"
    ):
        run(zoo.graph("mlp"), [Promises()])


def test_an_error_for_the_person_is_as_the_pass_words_it(zoo: Zoo) -> None:
    class Told(Bad):
        def call(self, graph: Graph) -> bool:
            raise WeightError("it is not there")

    with pytest.raises(WeightError) as caught:
        run(zoo.graph("mlp"), [Told()])
    assert str(caught.value) == "it is not there"


def test_an_adapter_that_a_pass_forgot_is_caught(zoo: Zoo) -> None:
    graph = run(zoo.graph("mlp"), [default("insert-lora", target="up", r=2)])
    with pytest.raises(VerifyError, match="lora_"):
        run(graph, [Forgets()])
