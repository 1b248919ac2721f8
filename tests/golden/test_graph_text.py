"""The text of a small graph after each pass, held against files: a change of it is seen in review.

Write them anew with `UPDATE_GOLDEN=1 pytest tests/golden`.
"""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import adaptc
from adaptc import passes
from adaptc.ir.graph import Graph

HERE = Path(__file__).parent


class Small(nn.Module):
    """Two layers, dropout between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.second = nn.Linear(8, 16), nn.Dropout(0.1), nn.Linear(16, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.drop(torch.relu(self.first(x))))


@pytest.fixture(scope="module")
def traced() -> Graph:
    return adaptc.trace(Small(), example_inputs=(torch.randn(2, 8),), dynamic={"x": {0: "batch"}})


def with_options(insert: adaptc.Pass, **options: object) -> adaptc.Pass:
    """The same pass with other options of its method."""
    return dataclasses.replace(insert, method=dataclasses.replace(insert.method, **options))


def pipelines() -> dict[str, list[adaptc.Pass]]:
    lora = passes.InsertLora(target=["first", "second"], r=1, alpha=4)
    return {
        "traced": [],
        "insert-lora": [lora],
        "factor": [lora, passes.Factor()],
        "factor-with-dropout": [with_options(lora, dropout=0.5), passes.Factor()],
        "factor-is-not-worth-it": [with_options(lora, r=8), passes.Factor()],
        "fold": [lora, passes.Fold()],
        "insert-dora": [passes.InsertDora(target="first", r=1)],
        "factor-ia3": [passes.InsertIa3(target="*", feedforward=("second",)), passes.Factor()],
    }


@pytest.mark.parametrize("name", pipelines())
def test_text(traced: Graph, name: str) -> None:
    text = adaptc.run(traced, pipelines()[name]).text() + "\n"
    text = re.sub(r"\bs\d+\b", "batch", text)  # torch's own name of the dimension
    file = HERE / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        file.write_text(text)
    assert text == file.read_text(), "run with UPDATE_GOLDEN=1 if this change is meant"


def test_the_text_fits_on_a_screen(traced: Graph) -> None:
    for name, pipeline in pipelines().items():
        lines = adaptc.run(traced, pipeline).text().splitlines()
        assert max(map(len, lines)) <= 160, name


def test_a_fold_reads_as_the_base() -> None:
    assert (HERE / "fold.txt").read_text() == (HERE / "traced.txt").read_text()
