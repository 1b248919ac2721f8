"""What holds for adapters made of any weight method's: the same change at full rank, the best one at any other."""

from __future__ import annotations

import pytest
import torch

from adaptc.arithmetic.change import changes_of
from adaptc.arithmetic.combined import combined
from adaptc.arithmetic.layers import Part
from adaptc.arithmetic.merging import Merge
from adaptc.compiler.plan.adapter_weights import load_checkpoints
from adaptc.compiler.plan.adapters import PlannedInsertion
from adaptc.ir.graph import Graph
from adaptc.methods.method import METHODS, WeightMethod
from adaptc.methods.site import MATRIX_KINDS, WeightSite
from adaptc.rewriter.pipeline import run
from adaptc.spec.spec import load
from tests.families import FAMILIES, Zoo, differs
from tests.laws.test_methods import one, skip_without_site

METHODS_OF_WEIGHTS = [name for name, cls in METHODS.items() if issubclass(cls, WeightMethod)]
QUICK = ("ia3", "dora", "full", "shira")
"""A scale of rows and biases, what depends on the base, whole modules, sparse changes of any tensor."""
EVERY = [
    pytest.param(
        method,
        name,
        id=f"{method}-{name}",
        marks=[pytest.mark.slow] * (method not in QUICK or name != one(method)),
    )
    for method in METHODS_OF_WEIGHTS
    for name in FAMILIES
]
EPSILON = 1e-5


def converted(graph: Graph, adapted: Graph, rank: int) -> tuple[Graph, dict[str, float]]:
    """The base with the low-rank adapter of what another does, and the errors that are told."""
    result = combined(graph, [Part(1.0, adapted, changes_of(graph, adapted))], Merge("svd"), rank)
    starts = result.starts()
    entries = [
        PlannedInsertion(0, item, item.selection(graph), starts=starts)
        for item in result.inserts("c", 0, "live")
    ]
    inserted = run(graph, [planned.insert for planned in entries])
    load_checkpoints(load({}), entries, graph, inserted)
    return inserted, result.errors


@pytest.mark.parametrize(("method", "name"), EVERY)
def test_a_conversion_is_the_best_of_its_rank(zoo: Zoo, method: str, name: str) -> None:
    skip_without_site(zoo, method, name)
    graph, adapted = zoo.graph(name), zoo.adapted(method, name).graph
    wanted = {use: change.delta() for use, change in changes_of(graph, adapted).items()}
    inserted, errors = converted(graph, adapted, 10**4)
    after = changes_of(graph, inserted)
    assert max(errors.values(), default=0.0) < EPSILON
    moved = 0
    for use, delta in wanted.items():
        got = after[use].delta() if use in after else torch.zeros_like(delta)
        scale = delta.abs().max()
        moved += int(scale > 0)
        assert float((got - delta).abs().max()) <= EPSILON * float(scale) + 1e-7
    assert moved
    _, cut = converted(graph, adapted, 1)
    for use, change in changes_of(graph, adapted).items():
        site = change.site
        assert isinstance(site, WeightSite)
        if site.kind not in MATRIX_KINDS or change.whole or site.batch is not None:
            continue
        values = torch.linalg.svdvals(site.matrix(wanted[use]))
        told = cut[site.name.removesuffix(".weight")]
        assert told == pytest.approx(float(values[1:].norm() / values.norm().clamp(min=1e-30)), abs=1e-4)


def test_a_combination_of_methods_is_the_sum_of_their_changes(zoo: Zoo) -> None:
    graph = zoo.graph("block")
    weights = {"ia3": 0.5, "lora": -2.0, "oft": 1.0}
    parts = [Part(w, a := zoo.adapted(m, "block").graph, changes_of(graph, a)) for m, w in weights.items()]
    result = combined(graph, parts, Merge("svd"), 64)
    tensors = result.starts()
    for layer in result.layers:
        theta = {name: weight.load().double() for name, weight in tensors[layer.site.pattern].items()}
        use = layer.site.uses[0]
        want = sum(part.weight * part.changes[use].delta() for part in parts if use in part.changes)
        assert isinstance(want, torch.Tensor)
        differs(want, torch.zeros_like(want))
        assert float((theta["B"] @ theta["A"] - want).norm() / want.norm()) < EPSILON
    assert {"query.bias", "key.bias"} < set(result.held_whole)  # (IA)³ scales the bias with the output
