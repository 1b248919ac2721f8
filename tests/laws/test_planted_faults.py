"""No tolerance lets a wrong rewrite pass: faults that are planted in a right one, for every method, fail its proof."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import adaptc
from adaptc.compiler.folding import _folded
from adaptc.compiler.proof.proofs import Proofs
from adaptc.errors import ProofError
from adaptc.ir.graph import Graph
from adaptc.ir.interpreter import Run
from adaptc.methods.method import METHODS
from adaptc.weights import Held
from tests.families import Zoo, entry, marked
from tests.laws.test_methods import one

QUICK = ("lora", "dora", "bitfit", "bottleneck", "prefix")
"""The methods that stand for all: of a product, a norm, scales, rotations, biases, and of each kind that stays."""


def with_tensor(graph: Graph, name: str, value: torch.Tensor) -> Graph:
    faulty = graph.copy()
    faulty.weights[name] = Held(value)
    return faulty


def floats(graph: Graph, name: str) -> bool:
    return graph.weights[name].dtype.is_floating_point


def changed(base: Graph, folded: Graph) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Name, the base's value and the folded one, of every weight that folding changed."""
    for name in base.weights.keys() & folded.weights.keys():
        before, after = base.weights[name].load(), folded.weights[name].load()
        if before.is_floating_point() and not torch.equal(before, after):
            yield name, before, after


def faults(base: Graph, folded: Graph) -> Iterator[tuple[str, Graph]]:
    """Each kind of fault, planted in one place."""
    weights = sorted(changed(base, folded), key=lambda item: item[0])
    if weights:
        name, before, after = weights[-1]
        yield f"{name} lacks its adapter", with_tensor(folded, name, before)
        yield f"{name} has twice its adapter", with_tensor(folded, name, 2 * after - before)
        yield f"{name} has another sign", with_tensor(folded, name, 2 * before - after)
    lost = folded.copy()
    stays = [name for name in folded.weights.keys() - base.weights.keys() if floats(folded, name)]
    lost.weights.update({name: Held(0 * folded.weights[name].load()) for name in stays})
    if stays:
        yield "the adapters that stay are lost", lost
    for name in [name for name in base.weights if name.endswith(".bias")][-1:]:
        yield f"{name} is dropped", with_tensor(folded, name, 0 * folded.weights[name].load())


def proved(made: adaptc.Compiled) -> tuple[Graph, Run, Graph]:
    """A graph with random adapters, a run of it, and the right fold, whose proof holds."""
    pairs: list[tuple[Graph, Graph]] = []

    def sides(random: Graph) -> tuple[Graph, Graph]:
        pairs.append((made.program.live_graph(random), _folded(made.program, random)))
        return pairs[-1]

    proofs = made.program.proofs
    proofs.with_random_adapters("fold", made.graph, sides)
    live, folded = pairs[-1]
    return live, proofs.run(live), folded


def holds(proofs: Proofs, live: Graph, reference: Run, candidate: Run) -> bool:
    try:
        proofs.prove("fold", live, reference, candidate)
    except ProofError:
        return False
    return True


@pytest.mark.parametrize("method", marked(METHODS, QUICK))
def test_a_planted_fault_fails_the_proof(zoo: Zoo, method: str) -> None:
    made = zoo.compiled(one(method), [entry(method, one(method))])
    live, reference, folded = proved(made)
    proofs, planted = made.program.proofs, list(faults(made.base, folded))
    assert planted
    for fault, faulty in planted:
        run = proofs.run_like(reference, faulty)
        assert not holds(proofs, live, reference, run), fault


class Amplifying(nn.Module):
    """Each layer makes the rounding of the layers before it larger, so that no fold meets the dtype's tolerance."""

    def __init__(self, depth: int = 14, gain: float = 5.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gain = gain
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(depth))
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.sin(self.gain * layer(x))
        return self.head(x)


def amplifying() -> adaptc.Compiled:
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    spec: dict[str, Any] = {"adapt": [{"method": "lora", "target": "layers.*", "r": 2}]}
    return adaptc.compile(spec, model=Amplifying().eval(), example_inputs=(x,), dynamic={"x": {0: "batch"}})


def test_the_models_own_rounding_is_allowed_and_no_fault_hides_in_it() -> None:
    made = amplifying()
    live, reference, folded = proved(made)
    proofs = made.program.proofs
    (proof,) = [proof for proof in proofs.held if proof.name == "fold"]
    assert proof.rounding is not None
    assert 6.1e-5 < proof.relative <= proof.tolerance < 1e-2
    assert "the model's own rounding is" in str(proof)
    for name, before, after in changed(made.base, folded):
        for value in (before, 2 * after - before):
            run = proofs.run_like(reference, with_tensor(folded, name, value))
            assert not holds(proofs, live, reference, run), name
