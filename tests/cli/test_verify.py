"""`adaptc verify`: every kind of artifact is proved again, and one flipped byte in any of its files is found."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import adaptc
from adaptc.cli.inspection import inspect, verify
from tests.families import Zoo, entry, perturb

KINDS = ("onnx", "external", "torch", "peft", "hf")


@pytest.fixture(scope="module")
def artifacts(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("artifacts")
    compiled = zoo.compiled("gpt2", [entry("lora", "gpt2")])
    perturb(compiled.module)
    compiled.emit("onnx", root / "onnx" / "model.onnx")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("adaptc.emit.onnx.export.INLINE_LIMIT", 1000)
        compiled.emit("onnx", root / "external" / "model.onnx", adapters="live")
    for kind in ("torch", "peft", "hf"):
        compiled.emit(kind, root / kind)
    assert (root / "external" / "model.onnx.data").exists()
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_an_artifact_is_proved_again(artifacts: Path, kind: str) -> None:
    rows = verify(artifacts / kind)
    files = {path.name for path in (artifacts / kind).iterdir()} - {"manifest.json"}
    assert files <= {row["what"] for row in rows}, "a file is not looked at"
    words = "every tensor is finite" if kind == "peft" else "computes what its graph did: relative error"
    assert words in rows[-1]["checked"]
    assert inspect(artifacts / kind)


@pytest.mark.parametrize("kind", KINDS)
def test_one_flipped_byte_is_found(artifacts: Path, kind: str) -> None:
    drawn = random.Random(0)
    for file in sorted(path for path in (artifacts / kind).rglob("*") if path.is_file()):
        good = file.read_bytes()
        for place in (0, len(good) - 1, *(drawn.randrange(len(good)) for _ in range(4))):
            bad = bytearray(good)
            bad[place] ^= 1 << drawn.randrange(8)
            for data in (bytes(bad), good[:place]):
                file.write_bytes(data)
                with pytest.raises(adaptc.AdaptcError) as caught:
                    verify(artifacts / kind)
                assert file.name in str(caught.value)
        file.write_bytes(good)
    verify(artifacts / kind)


@pytest.mark.parametrize("kind", ["onnx", "external", "torch", "hf"])
def test_an_artifact_that_computes_something_else_is_found(
    artifacts: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where every hash is right: as if another program stood there since it was compiled."""
    from adaptc.compiler.proof import reference

    again = reference._inputs_again

    def others(kept: Any) -> Any:
        return {label: {k: v.roll(1, -1) for k, v in batch.items()} for label, batch in again(kept).items()}

    monkeypatch.setattr(reference, "_inputs_again", others)
    with pytest.raises(adaptc.AdaptcError, match="no longer computes what its graph did"):
        verify(artifacts / kind)


def test_a_missing_file_and_a_missing_manifest(artifacts: Path, tmp_path: Path) -> None:
    for file in (artifacts / "hf").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").unlink()
    with pytest.raises(adaptc.AdaptcError, match=r"generation_config\.json: missing"):
        verify(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(adaptc.SpecError, match=r"no manifest\.json there"):
        verify(tmp_path)


def test_what_is_kept_is_small_and_plain(artifacts: Path) -> None:
    text = (artifacts / "onnx" / "manifest.json").read_text()
    kept = json.loads(text)["products"]["model.onnx"]["reference"]
    assert len(text) < 64_000
    assert all(len(output["values"]) <= 64 for outputs in kept["values"].values() for output in outputs)
    assert torch.tensor([float(v) for v in kept["values"]["batch=2 seq=5"][0]["values"]]).isfinite().all()
