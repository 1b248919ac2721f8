"""`adaptc compile --locked` and `adaptc diff`, called in this process."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.test_arithmetic import MODEL
from tests.command_line import run

SPEC = """\
version: 1
base: {python: "locked_models:build"}
inputs: {x: "float32[batch, 16]"}
adapt:
  - {method: lora, target: query, r: 4}
emit: [{format: peft, path: out/adapter}]
"""
OTHER = """\
version: 1
base: {python: "locked_models:build"}
inputs: {x: "float32[batch, 16]"}
adapt:
  - {method: lora, target: [query, value], r: 2}
  - {method: layernorm, target: norm, name: norms}
emit: [{format: peft, path: out/adapter}, {format: onnx, path: out/model.onnx}]
"""


@pytest.fixture
def spec(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "locked_models.py").write_text(MODEL)
    (tmp_path / "spec.yaml").write_text(SPEC)
    sys.path.insert(0, str(tmp_path))
    yield tmp_path / "spec.yaml"
    sys.path.remove(str(tmp_path))
    sys.modules.pop("locked_models", None)


def test_a_lock_is_written_and_held(spec: Path) -> None:
    first = run("compile", spec, "--locked")
    assert first.code == 0, first.err
    path = spec.with_suffix(".lock")
    assert f"wrote {path}" in first.out
    lock = json.loads(path.read_text())
    assert list(lock) == ["lock", "spec", "base", "adapters", "data", "versions"]
    assert len(lock["base"]["sha256"]) == 64
    again = run("compile", spec, "--locked", "--json")
    assert again.code == 0, again.err
    assert str(path) not in again.json["outputs"]
    written = path.read_text()
    lock["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(lock))
    refused = run("compile", spec, "--locked", "--set", "adapt.0.r=2", "--set", "base.args={seed: 1}")
    assert refused.code == 1
    now = json.loads(written)["versions"]["torch"]
    assert f"{path}: 4 things differ from what is locked (locked -> now)" in refused.err
    assert "  + spec base.args.seed: 1\n" in refused.err
    assert "  spec adapt.0.r: 4 -> 2\n" in refused.err
    assert f"  base sha256: {lock['base']['sha256']} -> " in refused.err
    assert f"  versions torch: 1.0 -> {now}" in refused.err
    assert "remove spec.lock, and compile with --locked" in refused.err
    path.write_text("{}")
    assert "no lock of format 1" in run("compile", spec, "--locked").err


def test_the_difference_of_two_specs_reads_as_a_person_would(spec: Path) -> None:
    other = spec.with_name("other.yaml")
    other.write_text(OTHER)
    ran = run("diff", spec, other)
    assert ran.code == 0, ran.err
    told, cost = ran.out.split("cost\n")
    assert told == (
        "options\n"
        "  adapt lora 'default': target: [query] -> [query, value]\n"
        "  adapt lora 'default': r: 4 -> 2\n"
        "  + adapt layernorm 'norms': {target: [norm]}\n"
        "  pipeline: insert-lora -> insert-lora > insert-layernorm\n"
        "sites\n"
        "  + value: lora 'default'\n"
        "  + norm.weight: layernorm 'norms'\n"
        "  + norm.bias: layernorm 'norms'\n"
        "products\n"
        "  + onnx out/model.onnx\n"
    )
    assert f"  trainable: {4 * (16 + 12)} -> {2 * (16 + 12) * 2 + 24}\n" in cost
    found = run("diff", spec, other, "--json", "--exit-code")
    assert found.code == 1
    assert [site["site"] for site in found.json["sites"]] == ["value.weight", "norm.weight", "norm.bias"]
    same = run("diff", spec, spec, "--exit-code")
    assert (same.code, same.out) == (0, "no difference\n")
