"""Every spec in specs/, replayed: all its graphs as text and the tensors of all its products, held against records.

The specs compile as they stand, but for a small base in place of MiniLM. Adapters are moved a little before products
are written, as if trained. On the machine that made the records each tensor's hash must be the same; on any other its
fingerprint, within a tolerance.

Write the records anew with `UPDATE_REPLAY=1 pytest -n 0 tests/replay`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.replay import sections
from tests.replay.recording import replay
from tests.replay.tensors import machine, tensors_differ
from tests.spec_bases import ROOT, SPECS, overrides_for

RECORDS = Path(__file__).parent / "records"
MACHINE = RECORDS / "machine.txt"
UPDATE = bool(os.environ.get("UPDATE_REPLAY"))
INPUTS = {"input_ids": "int64[batch, seq]", "attention_mask": "int64[batch, seq]", "labels": "int64[batch]"}
BASES: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "base-bert": ({}, {}),
    "base-bert-classifier": ({"task": "sequence-classification"}, INPUTS),
}
"""Bases without a method, which the records of the specs are told against: more of `base`, and `inputs`."""
QUICK = ("own-model", "peft-to-huggingface", "peft-to-onnx")
"""The journeys; golden texts and laws stand for methods and schemes."""


@pytest.mark.slow
@pytest.mark.parametrize("name", BASES)
def test_base(name: str, spec_bert: Path, tmp_path: Path) -> None:
    task, inputs = BASES[name]
    spec: dict[str, Any] = {"version": 1, "base": {"model": str(spec_bert), **task}, "inputs": inputs}
    emit = [{"format": "torch", "path": "trainable"}, {"format": "onnx", "path": "model.onnx"}]
    check(name, replay(spec, [], emit, tmp_path, {spec_bert: "BERT"}), base=None)


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] * (p.stem not in QUICK)) for p in SPECS],
)
def test_spec(
    path: Path, spec_bert: Path, spec_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    spec = YAML(typ="safe").load(path.read_text())
    places = {spec_bert: "BERT", spec_adapter: "ADAPTER", ROOT: "ROOT"}
    texts = replay(path, overrides_for(path, spec_bert, spec_adapter), spec["emit"], tmp_path, places)
    base = "base-bert-classifier" if spec["base"].get("task") == "sequence-classification" else "base-bert"
    check(path.stem, texts, base if "model" in spec["base"] else None)


def check(name: str, current: sections.Sections, base: str | None) -> None:
    """Hold texts against a record, or write it."""
    path = RECORDS / f"{name}.txt"
    if UPDATE:
        RECORDS.mkdir(exist_ok=True)
        MACHINE.write_text(machine())
        sections.write(path, current, RECORDS / f"{base}.txt" if base else None)
    recorded = sections.read(path)
    names = dict.fromkeys([*recorded, *current])
    exact = [n for n in names if not n.endswith(" tensors") or MACHINE.read_text() == machine()]
    wrong = [sections.difference(recorded, current, exact)]
    for other in (n for n in names if n not in exact):
        wrong.append(tensors_differ(recorded.get(other, ""), current.get(other, "")))
    said = "\n".join(text for text in wrong if text)
    assert not said, (
        f"{path.name} does not read the same:\n{said}\nrecord it anew if this is meant: UPDATE_REPLAY=1"
    )
