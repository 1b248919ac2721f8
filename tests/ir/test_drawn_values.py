"""Random inputs are like the examples: of their range, order and kind; no mask hides a whole row."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from adaptc.inputs import InputSpec
from adaptc.ir.drawn_values import draw, values_of
from adaptc.ir.example_inputs import example_tensors

SEEDS = range(8)


def drawn(name: str, example: torch.Tensor, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    values = values_of(name, [example])
    assert values is not None
    dims: tuple[str | int, ...] = tuple(f"d{axis}" for axis in range(example.dim()))
    spec = InputSpec(name, str(example.dtype).removeprefix("torch."), dims, values=values)
    assert InputSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    tensor = draw(spec, values, shape, torch.Generator().manual_seed(seed))
    assert tensor.shape == shape
    assert tensor.dtype == example.dtype
    return tensor


MASKS = {
    "torch hides the end": torch.tensor([[False, False, False, True], [False, False, False, False]]),
    "torch hides nothing": torch.zeros(2, 4, dtype=torch.bool),
    "torch hides the start": torch.tensor([[True, True, False, False], [False, False, False, False]]),
    "hugging face takes the start": torch.tensor([[True, True, False], [True, True, True]]),
    "hugging face takes everything": torch.ones(2, 4, dtype=torch.bool),
    "causal": torch.ones(4, 4, dtype=torch.bool).triu(1),
    "numbers": torch.ones(2, 4, dtype=torch.int64),
    "floats": torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]),
    "added": torch.tensor([[0.0, 0.0, -torch.inf], [0.0, 0.0, 0.0]]),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("shape", [(2, 5), (3, 2), (1, 9), (7, 7)])
def test_a_mask_has_both_values_in_every_row(name: str, shape: tuple[int, int]) -> None:
    """So it hides no whole row, whether True means taken or hidden."""
    example = MASKS[name]
    for seed in SEEDS:
        mask = drawn("mask", example, shape, seed)
        for row in mask:
            assert len(set(row.tolist())) == 2
        assert set(mask.flatten().tolist()) >= set(example.flatten().tolist())


@pytest.mark.parametrize("name", MASKS)
def test_a_row_of_one_is_what_no_example_hides(name: str) -> None:
    example = MASKS[name]
    whole = [row[0] for row in example if bool((row == row[0]).all())]
    mask = drawn("mask", example, (3, 1))
    assert mask.unique().numel() == 1
    assert not whole or mask[0, 0] == whole[0]


@pytest.mark.parametrize(
    "name", ["torch hides the end", "hugging face takes the start", "torch hides nothing"]
)
def test_padding_is_at_the_end_where_the_example_has_it_there(name: str) -> None:
    example = MASKS[name]
    visible = example[1, 0]
    for seed in SEEDS:
        taken = drawn("mask", example, (4, 9), seed) == visible
        assert bool((taken[:, :-1] >= taken[:, 1:]).all())


@pytest.mark.parametrize("name", ["key_padding_mask", "attention_mask", "keep"])
def test_booleans_without_an_example_have_both_values(name: str) -> None:
    spec = InputSpec(name, "bool", ("batch", "seq"))
    for seed in SEEDS:
        for row in example_tensors([spec], {"batch": 3, "seq": 6}, seed)[name]:
            assert len(set(row.tolist())) == 2
    one = example_tensors([spec], {"batch": 3, "seq": 1})[name]
    assert bool(one.any()) != ("pad" in name), "what pads is hidden where it is True"


RANGES: dict[str, Any] = {
    "floats": torch.randn(4, 6, generator=torch.Generator().manual_seed(0)),
    "positive": torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) + 0.1,
    "negative": -torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) - 0.1,
    "integers": torch.randint(3, 9, (4, 6), generator=torch.Generator().manual_seed(0)),
    "below zero": torch.arange(-9, 9).reshape(3, 6),
    "whole floats": torch.randint(0, 50, (4, 6), generator=torch.Generator().manual_seed(0)).float(),
    "halves": torch.rand(4, 6, generator=torch.Generator().manual_seed(0)).half(),
}


@pytest.mark.parametrize("name", RANGES)
def test_values_stay_in_the_range_of_the_example(name: str) -> None:
    example = RANGES[name]
    for seed in SEEDS:
        tensor = drawn("x", example, (5, 7), seed)
        assert example.min() <= tensor.min() < tensor.max() <= example.max()
        assert not bool((example == example.round()).all()) or bool((tensor == tensor.round()).all())


@pytest.mark.parametrize("value", [1.0, 0.25, -3.0])
def test_an_example_of_one_value_gives_others_of_its_sign(value: float) -> None:
    tensor = drawn("x", torch.full((2, 6), value), (4, 6))
    assert bool((tensor * value > 0).all())
    assert tensor.unique().numel() > 10


def test_an_example_of_zeros_says_nothing() -> None:
    tensor = drawn("x", torch.zeros(2, 6), (40, 6))
    assert tensor.min() < -1
    assert tensor.max() > 1


def test_ignored_labels_are_no_labels() -> None:
    labels = drawn("labels", torch.tensor([[-100, 3, 5, 4], [2, -100, 3, 5]]), (6, 9))
    assert 2 <= int(labels.min()) < int(labels.max()) <= 5


ORDERS = {
    "ascending": torch.tensor([[0.1, 0.2, 0.2, 0.7], [0.3, 0.4, 0.5, 0.5]]),
    "descending": torch.tensor([9, 7, 7, 2]),
    "offsets": torch.tensor([0, 3, 5, 9]),
    "positions": torch.arange(8)[None].expand(2, 8),
}


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("size", [2, 8, 30])
def test_rows_keep_the_order_of_the_example(name: str, size: int) -> None:
    example = ORDERS[name]
    for seed in SEEDS:
        tensor = drawn("x", example, (*example.shape[:-1], size), seed)
        steps = tensor.diff()
        assert bool((steps <= 0 if name == "descending" else steps >= 0).all())
        if name in ("offsets", "positions"):
            assert bool((steps > 0).all())
            assert bool((tensor[..., 0] == 0).all())
