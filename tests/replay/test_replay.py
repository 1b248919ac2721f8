"""Every spec in specs/, replayed: all its graphs as text and the tensors of all its products, held against records.

The specs compile as they stand, but for a small base in place of MiniLM. Adapters are moved a little before products
are written, as if trained, so that no zero hides what a fold does. On the machine that made the records each tensor's
hash must be the same, on any other its fingerprint within a tolerance.

Write the records anew with `UPDATE_REPLAY=1 pytest -n 0 tests/replay`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML

import adaptc
from tests.replay import sections
from tests.replay.programs import module_tensors, module_text, plain_text, product_texts
from tests.replay.tensors import machine, tensors_differ, tensors_text
from tests.spec_bases import ROOT, SPECS, overrides_for, save_bert, save_peft_adapter

RECORDS = Path(__file__).parent / "records"
MACHINE = RECORDS / "machine.txt"
UPDATE = bool(os.environ.get("UPDATE_REPLAY"))
BASES = {
    "base-bert": {},
    "base-bert-classifier": {
        "task": "sequence-classification",
        "inputs": {
            "input_ids": "int64[batch, seq]",
            "attention_mask": "int64[batch, seq]",
            "labels": "int64[batch]",
        },
    },
}
"""Bases without a method, which the records of the specs are told against."""
QUICK = ("lora", "nf4", "own-model", "peft-to-huggingface", "peft-to-onnx")
"""The journeys, and what stands for most methods and schemes."""


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def adapter(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_peft_adapter(bert, tmp_path_factory.mktemp("adapter"))


@pytest.mark.skipif(not UPDATE, reason="only where records are written")
def test_the_machine_is_written_down() -> None:
    MACHINE.write_text(machine())


@pytest.mark.slow
@pytest.mark.parametrize("name", BASES)
def test_base(name: str, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, inputs = {"model": str(bert)}, BASES[name].get("inputs", {})
    if "task" in BASES[name]:
        base["task"] = BASES[name]["task"]
    spec = {"version": 1, "base": base, "inputs": inputs}
    emit = [{"format": "torch", "path": "trainable"}, {"format": "onnx", "path": "model.onnx"}]
    paths = {str(bert): "BERT"}
    check(RECORDS / f"{name}.txt", replay(spec, [], emit, tmp_path, paths), base=None)


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] * (p.stem not in QUICK)) for p in SPECS],
)
def test_spec(
    path: Path, bert: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    text = path.read_text()
    emit = YAML(typ="safe").load(text)["emit"]
    paths = {str(bert): "BERT", str(adapter): "ADAPTER"}
    current = replay(path, overrides_for(path, bert, adapter), emit, tmp_path, paths)
    base = "base-bert-classifier" if "sequence-classification" in text else "base-bert"
    check(RECORDS / f"{path.stem}.txt", current, None if path.stem == "own-model" else RECORDS / f"{base}.txt")


def replay(
    spec: Path | Mapping[str, Any], overrides: list[str], emit: list[dict[str, Any]], folder: Path, paths: dict[str, str]
) -> sections.Sections:
    """Compile a spec and write its products; all there is to see, as named texts."""
    texts: sections.Sections = {}

    def record(name: str, found: str | Mapping[str, torch.Tensor]) -> None:
        text = found if isinstance(found, str) else tensors_text(found)
        for place, word in {str(folder): "OUT", str(ROOT): "ROOT", **paths}.items():
            text = text.replace(place, word)
        count = sum(other.partition(" #")[0] == name for other in texts)
        text = re.sub(r"[^\s\"]*/site-packages/", "", text)
        symbols = dict.fromkeys(re.findall(r"\bs\d+\b", text))
        for index, symbol in enumerate(symbols):
            text = re.sub(rf"\b{symbol}\b", f"size_{index}", text)
        texts[f"{name} #{count + 1}" if count else name] = text

    compiled = adaptc.compile(spec, overrides=overrides, after=lambda name, graph: record(f"after {name}", graph.text()))
    record("plan", "\n".join(plain_text(compiled.plan.to_json())))
    module = compiled.module
    record("module", module_text(module))
    record("module tensors", module_tensors(module))
    train_a_little(module)
    for index, entry in enumerate(emit):
        path = folder / str(index) / Path(entry["path"]).name
        compiled.emit(**{**entry, "path": path})
        check_proofs(path)
        for name, found in product_texts(f"emit {index} {entry['format']}", path):
            record(name, found)
    if compiled.spec.quantize:
        with_result(record, "inference", compiled.inference)
    else:
        with_result(record, "fold", compiled.fold)
    return texts


def with_result(record: Any, name: str, make: Any) -> None:
    try:
        module = make()
    except adaptc.RefusedError as error:
        record(f"{name} refused", str(error))
        return
    record(name, module_text(module))
    record(f"{name} tensors", module_tensors(module))


def train_a_little(module: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += torch.rand(parameter.shape, generator=generator) / 16 - 1 / 32


def check_proofs(path: Path) -> None:
    manifest = (path if path.is_dir() else path.parent) / "manifest.json"
    for product in json.loads(manifest.read_text())["products"].values():
        if "proof" in product:
            assert 0 <= product["proof"]["relative"] <= product["proof"]["tolerance"]


def check(path: Path, current: sections.Sections, base: Path | None) -> None:
    if UPDATE:
        path.parent.mkdir(exist_ok=True)
        sections.write(path, current, base)
    recorded = sections.read(path)
    same = MACHINE.read_text() == machine()
    exact = {name for name in recorded.keys() | current.keys() if same or not name.endswith("tensors")}
    wrong = sections.difference(*({n: t for n, t in texts.items() if n in exact} for texts in (recorded, current)))
    for name in sorted((recorded.keys() | current.keys()) - exact):
        wrong += tensors_differ(recorded.get(name, ""), current.get(name, ""))
    assert not wrong, f"{path.name} reads another way now:\n{wrong}\nUPDATE_REPLAY=1 if this is meant"
