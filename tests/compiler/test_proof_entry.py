"""`proof` in a spec: the person's own inputs, bound and sizes are what proofs use, and the manifest tells them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import adaptc
from adaptc.cli.inspection import verify
from adaptc.errors import ProofError
from adaptc.rewriter.expression import Expression
from tests.families import perturb, randomise


class Logarithm(nn.Module):
    """Takes only numbers above 0."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.l(x.log())


ROWS = torch.rand(4, 3, 6, generator=torch.Generator().manual_seed(0)) + 0.5


def made(folder: Path, **proof: Any) -> adaptc.Compiled:
    spec = {
        "version": 1,
        "inputs": {"x": "float32[batch, time, 6]"},
        "adapt": [{"method": "lora", "target": "l", "r": 2}],
        "proof": proof,
    }
    (folder / "spec.yaml").write_text(json.dumps(spec))
    compiled = adaptc.compile(folder / "spec.yaml", model=randomise(Logarithm()).eval())
    perturb(compiled.module)
    return compiled


def written(folder: Path, compiled: adaptc.Compiled) -> dict[str, Any]:
    compiled.emit("onnx", folder / "out" / "model.onnx")
    return json.loads((folder / "out" / "manifest.json").read_text())


@pytest.mark.parametrize("kind", ["jsonl", "safetensors"])
def test_rows_are_proved_first_and_random_ones_are_like_them(kind: str, tmp_path: Path) -> None:
    file = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        file.write_text("\n".join(json.dumps({"x": row.tolist()}) for row in ROWS))
        labels = ("rows.jsonl row 1", "rows.jsonl row 2", "rows.jsonl row 3", "rows.jsonl row 4")
    else:
        save_file({"x": ROWS}, file)
        labels = ("rows.safetensors",)
    manifest = written(tmp_path, made(tmp_path, inputs=file.name))
    random = ("batch=2 time=5", "batch=1 time=1", "batch=3 time=17")
    for proof in manifest["proofs"]:
        assert tuple(proof["shapes"]) == (*labels, *random)
        assert not proof["skipped"]
    told = manifest["proved_on"]
    assert tuple(told["own"]) == labels
    assert told["file"] == {
        "path": f"../{file.name}",
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }
    assert tuple(told["random"]) == random
    file.unlink()
    assert "computes what its graph did" in verify(tmp_path / "out" / "model.onnx")[-1]["checked"]


def test_without_rows_the_model_takes_no_random_input(tmp_path: Path) -> None:
    with pytest.raises(ProofError, match=r"no finite value .*`proof: \{inputs: rows\.jsonl\}`"):
        made(tmp_path, shapes=[{"batch": 2}])


def test_sizes_are_those_stated(tmp_path: Path) -> None:
    save_file({"x": ROWS}, tmp_path / "rows.safetensors")
    shapes = [{"batch": 2, "time": 64}, {"time": 3}]
    manifest = written(tmp_path, made(tmp_path, inputs="rows.safetensors", shapes=shapes))
    (product,) = manifest["products"].values()
    assert product["proof"]["shapes"] == ["rows.safetensors", "batch=2 time=64", "batch=3 time=3"]
    assert manifest["spec"]["proof"]["shapes"] == shapes
    checked = verify(tmp_path / "out" / "model.onnx")[-1]["checked"]
    assert checked.endswith("on batch=2 time=64, batch=3 time=3")


def test_the_tolerance_is_the_one_stated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"x": ROWS}, tmp_path / "rows.safetensors")
    right = Expression.evaluate
    monkeypatch.setattr(Expression, "evaluate", lambda self: right(self) * (1 + 1e-3))
    with pytest.raises(ProofError, match=r"of 6\.1e-05 allowed"):
        made(tmp_path, inputs="rows.safetensors").fold()
    loose = made(tmp_path, inputs="rows.safetensors", tolerance=1e-2)
    loose.fold()
    for proof in loose.proofs:
        assert proof.tolerance == 1e-2
        assert proof.rounding is None
        assert "; the spec states the tolerance" in str(proof)
    with pytest.raises(ProofError, match=r"of 1\.0e-09 allowed"):
        made(tmp_path, inputs="rows.safetensors", tolerance=1e-9).fold()
