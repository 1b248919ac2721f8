"""What a model counts itself may be left out of a call, as transformers' models take it: positions."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import adaptc
from adaptc.compiler.calibration import checked_batches
from adaptc.inputs import InputSpec
from adaptc.ir.counted import counted_by, with_counted
from tests.families import Zoo, close, entry, inputs, perturb


@pytest.fixture(scope="module")
def compiled(zoo: Zoo) -> adaptc.Compiled:
    made = zoo.compiled("gpt2", [entry("lora", "gpt2")])
    perturb(made.module)
    return made


def without_positions() -> dict[str, torch.Tensor]:
    tensors = inputs("gpt2", 2, 7)
    del tensors["position_ids"]
    return tensors


@pytest.mark.parametrize("kind", ["module", "copy", "fold", pytest.param("loaded", marks=pytest.mark.slow)])
def test_a_call_without_positions(compiled: adaptc.Compiled, kind: str, tmp_path: Path) -> None:
    tensors, module = without_positions(), compiled.module
    with torch.no_grad():
        want = module.eval()(**inputs("gpt2", 2, 7))["logits"]
    made: Any = module
    if kind == "copy":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own
            made = copy.deepcopy(module)
    elif kind == "fold":
        made = compiled.fold()
    elif kind == "loaded":
        compiled.emit("torch", tmp_path / "artifact")
        made = adaptc.load(tmp_path / "artifact")
    with torch.no_grad():
        close(made.eval()(**tensors)["logits"], want)
        close(made(*tensors.values())["logits"], want)


@pytest.mark.parametrize("given", [True, False])
def test_torch_compiles_a_call_as_one_graph(compiled: adaptc.Compiled, given: bool) -> None:
    tensors, module = inputs("gpt2", 2, 7) if given else without_positions(), compiled.module.eval()
    with torch.no_grad():
        want = module(**tensors)["logits"]
        close(torch.compile(module, fullgraph=True, backend="eager")(**tensors)["logits"], want)


SPECS = (
    InputSpec("input_ids", "int64", ("batch", "seq"), high=9),
    InputSpec("position_ids", "int64", ("batch", "seq"), high=9, counted=True),
)


def test_rows_of_data_may_leave_positions_out() -> None:
    ids = torch.ones(2, 4, dtype=torch.int64)
    (batch,) = checked_batches([{"input_ids": ids}], SPECS)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3]] * 2


def test_what_is_given_stays() -> None:
    ids, positions = torch.ones(1, 3, dtype=torch.int64), torch.tensor([[0, 0, 1]])
    counted = counted_by(SPECS)
    assert counted == {"position_ids": "input_ids"}
    assert with_counted(counted, {"input_ids": ids, "position_ids": positions})["position_ids"] is positions
