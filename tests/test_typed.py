"""A user's program is typed: pyright in strict mode finds nothing wrong, and finds what is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = """\
from pathlib import Path

import torch
from torch import nn

import adaptc


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.query(x)


def build(folder: Path) -> float:
    spec = {"adapt": [{"method": "lora", "target": "query", "r": 2}]}
    compiled = adaptc.compile(
        spec, model=Net(), example_inputs=(torch.randn(2, 8),), dynamic={"x": {0: "batch"}}, progress=True
    )
    parameters: int = compiled.plan.budget.trainable
    optimizer = torch.optim.SGD(adaptc.parameter_groups(compiled.module), lr=0.1 / parameters)
    loss: torch.Tensor = compiled.module(torch.randn(2, 8)).sum()
    loss.backward()
    optimizer.step()
    written = compiled.emit("onnx", folder / "model.onnx")
    path: Path = written.path
    worst = max(proof.relative for proof in compiled.proofs)
    module = adaptc.load(folder / "trainable")
    adaptc.save_adapter(module, folder / "adapter")
    label: str = adaptc.predict(path, "a text").label
    for timing in adaptc.bench(path).timings:
        if timing.median is not None:
            worst = max(worst, timing.median)
    return worst + len(label)
"""


def checked(tmp_path: Path, program: str) -> list[str]:
    """What pyright says of a program in strict mode: the lines that are wrong, with the rule."""
    (tmp_path / "program.py").write_text(program)
    config = {"include": ["program.py"], "extraPaths": [str(ROOT)], "typeCheckingMode": "strict"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(config))
    words = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson"]
    ran = subprocess.run([*words, "-p", str(tmp_path)], capture_output=True, text=True)
    found = json.loads(ran.stdout)["generalDiagnostics"]
    return [f"{each['range']['start']['line'] + 1}: {each['message']}" for each in found]


@pytest.mark.slow
def test_a_users_program_in_strict_mode(tmp_path: Path) -> None:
    assert not checked(tmp_path, PROGRAM)
    wrong = PROGRAM.replace("label: str", "label: int")
    assert [line.partition(":")[0] for line in checked(tmp_path, wrong)] == [
        str(PROGRAM[: PROGRAM.index("label: str")].count("\\n") + 1)
    ]
