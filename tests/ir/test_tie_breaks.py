"""Choices between near equals: two runs make the same ones, and no others."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

import adaptc
from adaptc.ir.graph import Graph
from adaptc.ir.interpreter import Interpreter, Run
from adaptc.ir.tie_breaks import TieBreaks
from adaptc.weights import Held
from tests.small_models import Calls


class Router(torch.nn.Module):
    """Each row goes to the expert, a sign and a scale, that likes it most."""

    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        self.gate = torch.nn.Linear(8, experts, bias=False)
        self.scale = torch.nn.Parameter(torch.randn(experts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, which = torch.topk(self.gate(x), 2, dim=-1)
        best, first = torch.max(self.gate(x), dim=-1)
        return (value * self.scale[which]).sum(-1) + best * self.scale[first]


def routed(change: torch.Tensor) -> tuple[Run, Graph]:
    """A router that has run on a batch where each row's experts tie but for 1e-5, and one whose gate is changed."""
    torch.manual_seed(0)
    model, x = Router(), torch.randn(64, 8)
    with torch.no_grad():
        row = torch.randn(8)
        model.gate.weight.copy_(row + 1e-5 * torch.randn(4, 8))
    graph = adaptc.trace(model, (x,), dynamic={"x": {0: "rows"}})
    first = Interpreter(graph).on({"rows": {"x": x}})
    other = graph.copy()
    other.weights["gate.weight"] = Held(model.gate.weight.detach() + change)
    return first, other


def test_choices_between_near_equals_are_the_others() -> None:
    noise = 1e-5 * torch.randn(4, 8, generator=torch.Generator().manual_seed(3))
    first, other = routed(noise)
    follower = Interpreter(other).on(first.batches, follows=first, near=1e-3)
    (want,), (got,) = first.outcomes.values(), follower.outcomes.values()
    (alone,) = Interpreter(other).on(first.batches).outcomes.values()
    assert isinstance(got, list)
    assert isinstance(want, list)
    assert isinstance(alone, list)
    assert float((alone[0] - want[0]).abs().max()) > 0.1, "nothing was flipped"
    assert float((got[0] - want[0]).abs().max()) < 1e-3
    assert 0 < follower.flipped <= 3 * 64
    assert follower.notes[-1] == f"{follower.flipped} choices between near equals as the reference's"


def test_any_other_choice_is_ones_own() -> None:
    first, other = routed(torch.tensor([0.0, 0.0, 0.0, 5.0])[:, None].expand(4, 8))
    follower = Interpreter(other).on(first.batches, follows=first, near=1e-3)
    (got,), (alone,) = follower.outcomes.values(), Interpreter(other).on(first.batches).outcomes.values()
    assert isinstance(got, list)
    assert isinstance(alone, list)
    assert torch.equal(got[0], alone[0])
    assert follower.flipped == 0
    assert follower.notes == ()
    assert follower.coverage == "whole, one weight at a time"


def test_a_masked_router_makes_its_own_choices() -> None:
    graph = adaptc.trace(
        Calls(lambda m, x: torch.topk(m.l(x), 1).values, l=nn.Linear(6, 4)),
        (torch.randn(3, 6),),
        dynamic={"x": {0: "batch"}},
    )
    node = next(n for n in graph.nodes if "topk" in str(n.target))
    scores = torch.tensor([[1.0, 5.0, -math.inf, 2.0]])
    other = TieBreaks(others=[torch.tensor([[0]])], near=0.1)
    assert other.make(node, scores, torch.topk(scores, 1))[1].tolist() == [[1]]
    assert other.flipped == 0


class Nearly(torch.nn.Module):
    """The experts of each row tie but for rounding, and which one is taken matters."""

    def __init__(self, choose: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.choose = choose
        self.gate, self.l = nn.Linear(64, 4, bias=False), nn.Linear(64, 64)
        self.sign = nn.Parameter(torch.tensor([1.0, -1.0, 2.0, -2.0]))
        with torch.no_grad():
            row = torch.randn(64, generator=generator)
            self.gate.weight.copy_(torch.stack([row, row.flip(0), row, row.flip(0)]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.gate(x + x.flip(-1))
        if self.choose == "topk":
            which = torch.topk(scores, 1, dim=-1).indices[..., 0]
        else:
            which = scores.argmax(-1) if self.choose == "argmax" else scores.max(-1).indices
        return self.l(x) * self.sign[which][..., None]


@pytest.mark.parametrize("choose", ["topk", "argmax", "max"])
def test_a_program_that_chooses_otherwise_between_near_equals_is_right(choose: str, tmp_path: Path) -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    lora = {"method": "lora", "target": "l", "r": 2}
    compiled = adaptc.compile(
        {"adapt": [lora]}, model=Nearly(choose).eval(), example_inputs=(x,), dynamic={"x": {0: "rows"}}
    )
    compiled.emit("onnx", tmp_path / "m.onnx")
    (proof,) = [proof for proof in compiled.proofs if proof.name == "onnx, folded"]
    assert "choices between near equals as the reference's" in str(proof)
