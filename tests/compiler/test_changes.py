"""A pass of a user's own that changes what the model computes is refused by how much, or meant."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

import adaptc
from adaptc.compiler.changes import comparison
from adaptc.errors import RefusedError
from adaptc.ir.graph import Graph
from adaptc.rewriter.pipeline import PassRecord, run
from tests.families import Zoo
from tests.pass_cases import Bad, default

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Scaled2(Bad):
    """The first layer gives something else, by a factor."""

    by: float = 2.0

    def call(self, graph: Graph) -> bool:
        node = next(n for n in graph.nodes if n.target is aten.linear.default)
        with graph.module.graph.inserting_after(node):
            other = graph.module.graph.call_function(aten.mul.Tensor, (node, self.by))
        node.replace_all_uses_with(other, delete_user_cb=lambda user: user is not other)
        return True


class Meant(Scaled2):
    changes_results = True


class Flattens(Bad):
    """Gives back other shapes."""

    def call(self, graph: Graph) -> bool:
        output = next(n for n in graph.nodes if n.op == "output")
        (node,) = output.all_input_nodes
        with graph.module.graph.inserting_before(output):
            output.replace_input_with(node, graph.call(aten.flatten.using_ints, node, like=node))
        return True


def test_a_pass_that_changes_results_is_refused_by_how_much(zoo: Zoo) -> None:
    with pytest.raises(RefusedError) as caught:
        adaptc.run(zoo.graph("mlp"), [Scaled2()])
    assert re.fullmatch(
        r"bad changes what the model computes: outputs differ by up to \d\.\de[+-]0\d of the largest, and rounding "
        r"explains 6\.1e-05\n  write `changes_results: ClassVar\[bool\] = True` in Scaled2 if it is meant to; "
        r"see the graph before and after it with `--dump-graphs DIR`",
        str(caught.value),
    )
    adaptc.run(zoo.graph("mlp"), [Scaled2(by=1.0)])
    with pytest.raises(
        RefusedError, match=r"changes what the model computes: output 0 is \[\d+\], expected \[\d, 6\]"
    ):
        adaptc.run(zoo.graph("mlp"), [Flattens()])


def test_a_pass_that_loses_an_adapter_at_its_start_is_refused(zoo: Zoo) -> None:
    """B is zero: only random adapters show it."""

    class Loses(Bad):
        def call(self, graph: Graph) -> bool:
            node = next(n for n in graph.nodes if n.target is aten.mm.default)
            with graph.module.graph.inserting_after(node):
                other = graph.module.graph.call_function(aten.mul.Tensor, (node, 0.5))
            other.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(other, delete_user_cb=lambda user: user is not other)
            return True

    with pytest.raises(RefusedError, match="bad changes what the model computes: outputs differ"):
        adaptc.run(zoo.graph("mlp"), [default("insert-lora", target="mid", r=2), Loses()])


def test_a_change_that_is_meant_is_recorded(zoo: Zoo) -> None:
    records = list[PassRecord]()
    run(zoo.graph("mlp"), [Meant(), Scaled2(by=1.0)], records, compare=comparison())
    assert [bool(record.change) for record in records] == [True, False]
    assert records[0].change.startswith("outputs differ by up to ")
