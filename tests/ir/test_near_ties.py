"""Labels that rounding decides: which others are as good, for every way a model makes labels of floats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import adaptc
from adaptc.compiler.proof.proof import prove
from adaptc.compiler.proof.runners import BatchRunner
from adaptc.errors import ProofError
from adaptc.ir.interpreter import Interpreter
from adaptc.ir.near_ties import floats_behind_labels, near_ties
from tests.small_models import Calls

TIED = torch.tensor([[1.0, 1.0 - 1e-6, -2.0, 0.5], [3.0, 1.0, 0.0, -1.0], [0.25, 0.5, 0.75, 0.75 + 1e-6]])
"""The two largest of the first and the last row nearly tie."""
NEAR = 1e-5


def traced(forward: Callable[[Any, torch.Tensor], Any]) -> adaptc.Graph:
    model = Calls(forward, l=nn.Linear(4, 4))
    with torch.no_grad():
        model.l.weight.copy_(torch.eye(4))  # type: ignore[union-attr, operator]
        model.l.bias.zero_()  # type: ignore[union-attr, operator]
    return adaptc.trace(model.eval(), (torch.randn(3, 4),), dynamic={"x": {0: "batch"}})


def good(
    forward: Callable[[Any, torch.Tensor], Any], labels: torch.Tensor, x: torch.Tensor = TIED
) -> list[Any]:
    return near_ties(traced(forward), {"x": x}, 0, [labels], NEAR, None).tolist()


LARGEST: dict[str, tuple[Callable[[Any, torch.Tensor], Any], Callable[[torch.Tensor], torch.Tensor]]] = {
    "argmax": (lambda m, x: m.l(x).argmax(-1), lambda i: i),
    "argmax, kept": (lambda m, x: m.l(x).argmax(-1, keepdim=True), lambda i: i[:, None]),
    "argmin": (lambda m, x: (-m.l(x)).argmin(1), lambda i: i),
    "max": (lambda m, x: m.l(x).max(-1).indices, lambda i: i),
    "min": (lambda m, x: (-m.l(x)).min(-1).indices, lambda i: i),
    "topk": (lambda m, x: m.l(x).topk(1, -1).indices, lambda i: i[:, None]),
    "topk of two, the first": (lambda m, x: m.l(x).topk(2, -1).indices[:, 0], lambda i: i),
    "sort": (lambda m, x: m.l(x).sort(-1, descending=True).indices[:, :1], lambda i: i[:, None]),
    "argsort": (lambda m, x: m.l(x).argsort(-1, descending=True)[:, 0], lambda i: i),
    "kthvalue": (lambda m, x: m.l(x).kthvalue(4, -1).indices, lambda i: i),
    "moved": (
        lambda m, x: m.l(x).argmax(-1).to(torch.int32).view(1, -1).t().contiguous(),
        lambda i: i[:, None],
    ),
}


@pytest.mark.parametrize("name", LARGEST)
def test_the_second_of_two_near_equals_is_as_good(name: str) -> None:
    forward, shaped = LARGEST[name]
    assert good(forward, shaped(torch.tensor([1, 0, 2]))) == shaped(torch.tensor([True, True, True])).tolist()
    assert (
        good(forward, shaped(torch.tensor([0, 1, 3]))) == shaped(torch.tensor([True, False, True])).tolist()
    )
    assert (
        good(forward, shaped(torch.tensor([2, 0, 0]))) == shaped(torch.tensor([False, True, False])).tolist()
    )
    assert (
        good(forward, shaped(torch.tensor([9, -1, 2]))) == shaped(torch.tensor([False, False, True])).tolist()
    )


def test_an_argmax_of_everything() -> None:
    assert good(lambda m, x: m.l(x).argmax(), torch.tensor(4)) is True
    x = torch.tensor([[1.0, 1.0 + 1e-7]]).repeat(1, 2)
    assert good(lambda m, x: m.l(x).argmax(), torch.tensor(0), x) is True
    assert good(lambda m, x: m.l(x).argmax(), torch.tensor(0)) is False


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.l(x) > 0.75,
        lambda m, x: (m.l(x) - 0.75).ge(0.0),
        lambda m, x: (m.l(x) > 0.75).long(),
        lambda m, x: torch.gt(m.l(x).flip(-1), 0.75).flip(-1),
    ],
)
def test_a_comparison_may_turn_at_its_threshold_alone(forward: Any) -> None:
    turned = good(forward, ~(TIED > 0.75))
    assert turned == [[False] * 4, [False] * 4, [False, False, True, True]]


@pytest.mark.parametrize(
    ("forward", "values"),
    [
        (lambda m, x: m.l(x).round().to(torch.int64), [0.5 + 1e-7, 1.5 - 1e-7, 0.7, 0.0]),
        (lambda m, x: m.l(x).floor().long(), [1.0, 2.0 - 1e-7, 0.7, 0.5]),
        (lambda m, x: m.l(x).long(), [1.0, 2.0 - 1e-7, 0.7, 0.5]),
        (lambda m, x: m.l(x).round().clamp(-8, 7).to(torch.int8), [0.5 + 1e-7, 1.5 - 1e-7, 0.7, 0.0]),
    ],
)
def test_a_whole_number_may_turn_at_the_edge_alone(forward: Any, values: list[float]) -> None:
    x = torch.tensor([values])
    chosen = forward(Calls(forward, l=nn.Identity()), x)
    assert good(forward, chosen + 1, x) == [[True, True, False, False]]
    assert good(forward, chosen + 2, x) == [[False] * 4]


def test_labels_that_no_float_decides_must_be_equal() -> None:
    assert good(lambda m, x: (m.l(x).argmax(-1) + 1) % 4, torch.tensor([2, 1, 3])) == [False] * 3


def test_both_sides_must_be_as_good() -> None:
    """Else a graph that is wrong would excuse any label of the model."""
    graph = traced(lambda m, x: m.l(x).argmax(-1))
    own, wrong = torch.tensor([0, 0, 3]), torch.tensor([2, 0, 3])
    assert near_ties(graph, {"x": TIED}, 0, [own, wrong], NEAR, None).tolist() == [False, True, True]


def test_the_floats_behind_labels() -> None:
    graph = traced(lambda m, x: (m.l(x), m.l(x).argmax(-1), (m.l(x) > 0).sum(-1)))
    run = floats_behind_labels(graph, {"rows": {"x": TIED}}, None)
    (outcome,) = run.outcomes.values()
    assert isinstance(outcome, list)
    assert [value.tolist() for value in outcome] == [TIED.tolist()]


def labelled(labels: list[int]) -> Any:
    graph = traced(lambda m, x: (m.l(x), m.l(x).argmax(-1)))
    reference = Interpreter(graph).on({"rows": {"x": TIED}})
    candidate = BatchRunner(lambda batch: [TIED, torch.tensor(labels)]).on(reference.taken)
    return prove("test", reference, candidate, NEAR, graph)


def test_a_proof_counts_and_tells_near_ties() -> None:
    assert labelled([0, 0, 3]).notes == ()
    proof = labelled([1, 0, 2])
    assert proof.notes == ("2 labels of output_1 differ between near ties",)
    assert str(proof).endswith("on rows; 2 labels of output_1 differ between near ties")


@pytest.mark.parametrize("labels", [[2, 0, 3], [0, 1, 3], [0, 0, 7]])
def test_any_other_label_is_no_proof(labels: list[int]) -> None:
    with pytest.raises(ProofError, match=r"1 label of output_1 differs, and not between near ties, on rows"):
        labelled(labels)
