"""Each product tells of its own compile: in the manifest beside it, and in a program's own metadata."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

import adaptc
from adaptc.cli.inspection import inspect, verify
from adaptc.emit.onnx.provenance import KEY, embedded
from adaptc.spec.spec import load


class Wide(torch.nn.Sequential):
    """A model that is told from `torch.nn.Sequential` by its name."""


def compiled(model: torch.nn.Module, width: int) -> Any:
    spec = {"adapt": [{"method": "lora", "target": "0", "r": 2}]}
    return adaptc.compile(spec, model=model, example_inputs=(torch.randn(3, width),))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Programs of two models in one folder, one with a data file."""
    root = tmp_path_factory.mktemp("mixed")
    compiled(Wide(torch.nn.Linear(8, 8)), 8).emit("onnx", root / "wide.onnx")
    other = compiled(torch.nn.Sequential(torch.nn.Linear(4, 4)), 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("adaptc.emit.onnx.export.INLINE_LIMIT", 10)
        other.emit("onnx", root / "other.onnx", adapters="live")
    assert (root / "other.onnx.data").exists()
    return root


def shown(path: Path) -> dict[str, Any]:
    return {row["what"]: row["value"] for row in inspect(path)}


def test_two_models_in_one_folder(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    products = manifest["products"]
    assert manifest["base"] == products[manifest["latest"]]["provenance"]["base"]
    bases = {name: product["provenance"]["base"]["model"] for name, product in products.items()}
    assert bases == {
        "wide.onnx": f"{Wide.__module__}.Wide",
        "other.onnx": "torch.nn.modules.container.Sequential",
    }
    assert products["wide.onnx"]["provenance"]["sites"][0]["shape"] == [8, 8]
    assert products["other.onnx"]["provenance"]["sites"][0]["shape"] == [4, 4]
    for name, base in bases.items():
        assert shown(folder / name)["base"] == base
        assert shown(folder)[f"{name}: base"] == base
        assert verify(folder / name)
    assert verify(folder)


@pytest.mark.parametrize("name", ["wide.onnx", "other.onnx"])
def test_a_copy_is_verified_by_itself(folder: Path, name: str, tmp_path: Path) -> None:
    """Under another name, without a manifest, and beside one that does not list it."""
    copy = tmp_path / "renamed.onnx"
    shutil.copy(folder / name, copy)
    if name == "other.onnx":
        with pytest.raises(
            adaptc.ProofError, match=r"other\.onnx\.data: missing, though renamed\.onnx needs it"
        ):
            verify(copy)
        shutil.copy(folder / "other.onnx.data", tmp_path)
    for _ in range(2):
        assert "computes what its graph did: relative error" in verify(copy)[-1]["checked"]
        assert shown(copy)["base"] == shown(folder / name)["base"]
        shutil.copy(folder / "manifest.json", tmp_path)


@pytest.mark.parametrize("name", ["wide.onnx", "other.onnx"])
def test_a_changed_copy_is_found(folder: Path, name: str, tmp_path: Path) -> None:
    """A byte of the program, of its metadata or of its data file; a program that another tool wrote anew."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "manifest.json").unlink()
    program = tmp_path / name
    for file in (tmp_path / name, tmp_path / f"{name}.data"):
        good = file.read_bytes() if file.exists() else b""
        for place in range(0, len(good), max(len(good) // 25, 1)):
            bad = bytearray(good)
            bad[place] ^= 1
            file.write_bytes(bad)
            with pytest.raises(adaptc.AdaptcError):
                verify(program)
            file.write_bytes(good)
    model = onnx.load(program, load_external_data=False)
    model.graph.node[0].name += "x"
    onnx.save(model, program)
    with pytest.raises(adaptc.ProofError, match="changed since it was compiled"):
        verify(program)
    kept = [item for item in model.metadata_props if item.key != KEY]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    onnx.save(model, program)
    with pytest.raises(adaptc.SpecError, match=r"no manifest\.json there"):
        verify(program)


def test_two_compiles_write_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    model = Wide(torch.nn.Linear(8, 8))
    for name in ("a", "b"):
        torch.manual_seed(1)  # of the example
        compiled(model, 8).emit("onnx", tmp_path / name / "wide.onnx")
    assert (tmp_path / "a" / "wide.onnx").read_bytes() == (tmp_path / "b" / "wide.onnx").read_bytes()


def test_paths_of_the_spec_are_told_from_the_manifest(tmp_path: Path) -> None:
    """So a folder can be moved with all that it names; a path that the spec states as absolute stays so."""
    program = torch.export.export(torch.nn.Sequential(torch.nn.Linear(4, 4)), (torch.randn(3, 4),))
    torch.export.save(program, tmp_path / "base.pt2")
    spec = tmp_path / "specs" / "spec.yaml"
    spec.parent.mkdir()
    text = "version: 1\nbase: {program: ../base.pt2}\nadapt:\n  - {method: lora, target: all-linear, r: 2}\n"
    spec.write_text(text + "emit:\n  - {format: onnx, path: ../build/model.onnx}\n")
    made = adaptc.compile(spec)
    from adaptc.compiler.artifacts.emit import emit_all

    emit_all(made.program, made.spec.emit)
    told = json.loads((tmp_path / "build/manifest.json").read_text())
    assert told["base"]["model"] == os.path.join("..", "base.pt2")
    assert told["spec_folder"] == os.path.join("..", "specs")
    assert load(told["spec"]).base == made.spec.base
    assert str(tmp_path) not in json.dumps(embedded(tmp_path / "build" / "model.onnx"))
    absolute = adaptc.compile(spec, overrides=[f"base.program={tmp_path / 'base.pt2'}"])
    absolute.emit("onnx", tmp_path / "build" / "absolute.onnx")
    assert shown(tmp_path / "build" / "absolute.onnx")["base"] == str(tmp_path / "base.pt2")
