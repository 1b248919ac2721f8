"""Inputs that are the same in every call: what a model reads of them in Python is known to its trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import adaptc
from adaptc.emit.onnx.runtime import onnx_runner
from adaptc.errors import InputError, SpecError, TraceError
from adaptc.inputs import InputSpec
from adaptc.ir.nodes import operation
from tests.families import close, randomise


class Patched(nn.Module):
    """Patches of an image: a mask says which are taken, and the number of rows and columns in which order."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 6)
        self.table = nn.Embedding(8, 6)

    def forward(self, x: torch.Tensor, grid: torch.Tensor, taken: torch.Tensor) -> torch.Tensor:
        rows, columns = grid.tolist()
        columns_first = torch.arange(rows * columns).reshape(rows, columns).t().flatten()
        positions = columns_first[columns_first != 1]
        shifted = positions + 1
        shifted[0] = int(grid.prod()) - 1
        parts = torch.split(self.proj(x)[:, taken], [rows, int(taken.sum()) - rows], dim=1)
        return torch.cat([parts[1], parts[0]], dim=1)[:, positions] + self.table(shifted)


GRID, TAKEN = [2, 3], [True, True, False, True, True, False, True, True]
SPEC: dict[str, Any] = {"inputs": {"x": "float32[batch, 8, 4]", "grid": GRID, "taken": TAKEN}}


def test_what_is_computed_of_constants_is_no_part_of_the_program(tmp_path: Any) -> None:
    model = randomise(Patched()).eval()
    compiled = adaptc.compile(SPEC, model=model)
    assert [spec.name for spec in compiled.base.inputs] == ["x"]
    compiled.emit("onnx", tmp_path / "model.onnx")
    for batch in (1, 3):
        x = torch.randn(batch, 8, 4)
        want = model(x, torch.tensor(GRID), torch.tensor(TAKEN))
        close(onnx_runner(tmp_path / "model.onnx")({"x": x})[0], want)
        close(compiled.module(x=x, grid=torch.tensor(GRID)), want)
    left = {operation(node) for node in compiled.base.nodes if node.op == "call_function"}
    assert left == {"linear", "index", "split_with_sizes", "slice", "getitem", "cat", "embedding", "add"}
    told = "grid is [2, 3] in every product: the model reads it in Python (to change it, write `inputs`)"
    assert told in compiled.plan.notes
    assert compiled.plan.to_json()["constants"] == {"grid": GRID, "taken": TAKEN}
    with pytest.raises(
        InputError, match=r"grid is \[2, 3\] in the trace, got \[3, 2\](.|\n)*compile it again"
    ):
        compiled.module(x=torch.randn(1, 8, 4), grid=torch.tensor([3, 2]))


def test_a_size_that_is_read_is_told_to_be_written() -> None:
    sizes = {"x": "float32[batch, 8, 4]", "grid": "int64[2]", "taken": TAKEN}
    told = r"grid is the same in every call, write its value under `inputs`, such as grid: \[\d, \d\]"
    with pytest.raises(TraceError, match=told):
        adaptc.compile({"inputs": sizes}, model=Patched())


def test_a_constant_that_forward_does_not_take() -> None:
    with pytest.raises(
        InputError, match=r"Patched.forward takes no 'grids', which is a constant of `inputs`"
    ):
        adaptc.compile({"inputs": {"x": "float32[1, 8, 4]", "grids": GRID}}, model=Patched())


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ([[1, 2], [3]], "the lists of a constant are of one length"),
        ([], "the lists of a constant are of one length"),
        (["a"], "a constant is a list of numbers or of booleans, got"),
        ([True, 2], "a constant is a list of numbers or of booleans, got"),
    ],
)
def test_a_constant_that_is_no_tensor(value: Any, told: str) -> None:
    with pytest.raises(SpecError, match=told):
        adaptc.compile({"inputs": {"x": "float32[1, 8, 4]", "grid": value}}, model=Patched())


def test_a_constant_is_written_and_read() -> None:
    for value, dtype in (([[1, 16, 16]], "int64"), ([0.5, 1], "float32"), ([True], "bool")):
        spec = InputSpec.parse("grid", value)
        assert (spec.dtype, spec.stated, InputSpec.from_json(spec.to_json())) == (dtype, value, spec)
