"""The torch artifact: it comes back whole, in another process, without the base's files."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import adaptc
from adaptc.compiler.compiled import Compiled
from tests.families import FAMILIES, Zoo, close, entry, inputs, outputs, perturb

NAMES = [n if n == "mlp" else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES]

CHILD = """
import sys, json, torch
from safetensors.torch import save_file
import adaptc
torch.set_num_threads(1)
directory, out = sys.argv[1:]
module = adaptc.load(directory)
feeds = torch.load(out + "/feeds.pt", weights_only=True)
def flat(result):
    result = {"output": result} if isinstance(result, torch.Tensor) else result
    return {k: v.detach().contiguous() for k, v in result.items() if isinstance(v, torch.Tensor)}
found = {}
for number, feed in enumerate(feeds):
    module.eval()
    with torch.no_grad():
        found |= {f"eval.{number}.{k}": v for k, v in flat(module(**feed)).items()}
module.train()
torch.manual_seed(21)
found |= {f"train.{k}": v for k, v in flat(module(**feeds[0])).items()}
found |= {f"buffer.{k}": v.clone() for k, v in module.named_buffers()}
save_file({k: v.clone() for k, v in found.items()}, out + "/found.safetensors")
adaptc.save_adapter(module, out + "/saved")
twins = {}
for name, p in module.named_parameters(remove_duplicate=False):
    twins.setdefault(id(p), []).append(name)
json.dump({
    "names": list(module.state_dict()),
    "trainable": [n for n, p in module.named_parameters() if p.requires_grad],
    "tied": [names for names in twins.values() if len(names) > 1],
    "mode": module.training,
}, open(out + "/about.json", "w"))
"""


@dataclass
class Reloaded:
    """What a fresh process saw of an artifact."""

    compiled: Compiled
    artifact: Path
    tensors: dict[str, torch.Tensor]
    about: dict[str, Any]
    feeds: list[dict[str, torch.Tensor]]
    saved: Path


@pytest.fixture(scope="module")
def reload(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Reloaded] = {}

    def once(name: str) -> Reloaded:
        if name in made:
            return made[name]
        out = tmp_path_factory.mktemp(f"artifact-{name}")
        adapt = [entry("lora", name, dropout=0.3), entry("ia3", name)]
        if FAMILIES[name].task:  # a base of its own, so that its files can be deleted
            shutil.copytree(zoo.directory(name), out / "base")
            spec = {"base": {"model": str(out / "base"), "task": FAMILIES[name].task}, "adapt": adapt}
            compiled = adaptc.compile(spec)
        else:
            compiled = adaptc.compile(
                {"adapt": adapt},
                model=zoo.fresh(name),
                example_inputs=inputs(name, 3, 11),
                dynamic=zoo.dynamic(name),
            )
        perturb(compiled.module)
        compiled.emit("torch", out / "trainable")
        shutil.rmtree(out / "base", ignore_errors=True)
        feeds = [inputs(name, 3, 7, pad=True), inputs(name, 1, 4), inputs(name, 2, 1)]
        torch.save(feeds, out / "feeds.pt")
        subprocess.run(
            [sys.executable, "-c", CHILD, str(out / "trainable"), str(out)], check=True, timeout=300, cwd=out
        )
        made[name] = Reloaded(
            compiled,
            out / "trainable",
            load_file(out / "found.safetensors"),
            json.loads((out / "about.json").read_text()),
            feeds,
            out / "saved",
        )
        return made[name]

    return once


@pytest.mark.parametrize("name", NAMES)
def test_evaluates_as_before(reload: Any, name: str) -> None:
    found = reload(name)
    module = found.compiled.module.eval()
    for number, feed in enumerate(found.feeds):
        with torch.no_grad():
            want = outputs(module, feed, found.compiled.graph.outputs)
        for key, value in want.items():
            close(found.tensors[f"eval.{number}.{key}"], value)


@pytest.mark.parametrize("name", NAMES)
def test_trains_as_before(reload: Any, name: str) -> None:
    """Dropout draws the same numbers, batch norm moves the same statistics."""
    found = reload(name)
    module = found.compiled.module.train()
    torch.manual_seed(21)
    want = outputs(module, found.feeds[0], found.compiled.graph.outputs)
    for key, value in want.items():
        close(found.tensors[f"train.{key}"], value)
    with torch.no_grad():
        still = outputs(module.eval(), found.feeds[0], found.compiled.graph.outputs)
    assert any(not torch.equal(value, still[key]) for key, value in want.items()), "no dropout at all"
    for key, buffer in module.named_buffers():
        if key in found.compiled.base.weights:
            close(found.tensors[f"buffer.{key}"].double(), buffer.double(), dtype=torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_names_ties_and_what_trains(reload: Any, name: str) -> None:
    found = reload(name)
    module = found.compiled.module
    assert set(found.about["names"]) == set(module.state_dict())
    assert found.about["names"] == list(module.state_dict()), "another order"
    assert set(found.about["trainable"]) == set(found.compiled.graph.adapter_names)
    twins: dict[int, list[str]] = {}
    for key, parameter in module.named_parameters(remove_duplicate=False):
        twins.setdefault(id(parameter), []).append(key)
    tied = sorted(sorted(names) for names in twins.values() if len(names) > 1)
    assert sorted(sorted(names) for names in found.about["tied"]) == tied
    assert bool(tied) == (name in ("gpt2", "t5", "gemma2", "bart", "whisper"))
    assert found.about["mode"] is True


@pytest.mark.parametrize("name", NAMES)
def test_adapters_are_saved_from_the_module_by_itself(reload: Any, name: str, tmp_path: Path) -> None:
    found = reload(name)
    module = adaptc.load(found.artifact)
    values = {n: p for n, p in module.named_parameters() if p.requires_grad}
    want = {n: p.detach().clone() for n, p in values.items()}
    with torch.no_grad():
        for parameter in values.values():
            parameter.zero_()
    adaptc.load_adapter(module, found.saved)
    for key, value in want.items():
        assert torch.equal(values[key], value), key
    adaptc.save_adapter(module, tmp_path / "again")
    for file in (p.relative_to(found.saved) for p in found.saved.rglob("*") if p.is_file()):
        if file.suffix == ".json":
            assert (tmp_path / "again" / file).read_text() == (found.saved / file).read_text()
        else:
            ours, theirs = load_file(tmp_path / "again" / file), load_file(found.saved / file)
            assert list(ours) == list(theirs)
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    found.compiled.load_adapter(found.saved)  # and back into the module it came from


@pytest.mark.parametrize("name", NAMES)
def test_no_pickle_but_the_archives_own(reload: Any, name: str) -> None:
    """torch.export's own archive holds its sample inputs as `.pt` and constants; nothing else may be a pickle."""
    found = reload(name)
    allowed = ("sample_inputs/", "/sample_inputs", "example_inputs")
    files = [p for p in found.artifact.rglob("*") if p.is_file()]
    assert {p.name for p in files} == {"program.pt2", "manifest.json"}
    with zipfile.ZipFile(found.artifact / "program.pt2") as archive:
        for item in archive.infolist():
            head = archive.read(item)[:2]
            pickled = head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
            zipped = head == b"PK"
            if pickled or zipped or item.filename.endswith((".pkl", ".bin.pkl")):
                assert any(part in item.filename for part in allowed), f"a pickle: {item.filename}"


def test_a_broken_artifact_is_an_error(reload: Any, tmp_path: Path) -> None:
    found = reload("mlp")
    for damage in ("truncated", "no program", "no manifest", "another program"):
        directory = tmp_path / damage
        shutil.copytree(found.artifact, directory)
        program, manifest = directory / "program.pt2", directory / "manifest.json"
        match damage:
            case "truncated":
                program.write_bytes(program.read_bytes()[: program.stat().st_size // 2])
            case "no program":
                program.unlink()
            case "no manifest":
                manifest.unlink()
            case "another program":
                manifest.write_text(manifest.read_text().replace('"up.weight"', '"other.weight"'))
        with pytest.raises(
            adaptc.AdaptcError, match=str(directory) if damage != "another program" else "other"
        ):
            adaptc.load(directory)


def test_a_checkpoint_of_another_base_is_refused(zoo: Zoo, reload: Any, tmp_path: Path) -> None:
    found = reload("mlp")
    module = adaptc.load(found.artifact)
    other = zoo.fresh("mlp")
    with torch.no_grad():
        other.up.weight[0, 0] += 1
    compiled = adaptc.compile(
        {"adapt": [entry("lora", "mlp", dropout=0.3), entry("ia3", "mlp")]},
        model=other,
        example_inputs=inputs("mlp", 3, 11),
        dynamic=zoo.dynamic("mlp"),
    )
    compiled.save_adapter(tmp_path / "other")
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(adaptc.AdaptcError, match="another base"):
        adaptc.load_adapter(module, tmp_path / "other")
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def craft(source: Path, target: Path, way: str, marker: Path) -> None:
    """Copy a program with a pickle that runs code in one of the places where torch.export reads one."""
    buffer = io.BytesIO()
    torch.save(Payload(marker), buffer)
    with zipfile.ZipFile(source) as honest, zipfile.ZipFile(target, "w") as crafted:
        names = honest.namelist()
        config = next(n for n in names if n.endswith("model_weights_config.json"))
        weights = json.loads(honest.read(config))
        chosen = weights["config"]["up.weight"]
        for name in names:
            data = honest.read(name)
            if way == "sample inputs" and name.endswith("sample_inputs/model.pt"):
                data = buffer.getvalue()
            if way == "pickled weight" and name == config:
                data = json.dumps(
                    {"config": weights["config"] | {"up.weight": chosen | {"use_pickle": True}}}
                )
            if way == "pickled weight" and name.endswith(f"/weights/{chosen['path_name']}"):
                data = buffer.getvalue()
            crafted.writestr(name, data)


@pytest.mark.parametrize("way", ["sample inputs", "pickled weight"])
def test_a_crafted_artifact_runs_no_code(reload: Any, tmp_path: Path, way: str) -> None:
    artifact, marker = tmp_path / "crafted", tmp_path / "marker"
    shutil.copytree(reload("mlp").artifact, artifact)
    craft(reload("mlp").artifact / "program.pt2", artifact / "program.pt2", way, marker)
    with pytest.raises(adaptc.AdaptcError):
        adaptc.load(artifact)
    assert not marker.exists(), "loading an artifact ran code from it"


@pytest.mark.parametrize("way", ["sample inputs", "pickled weight"])
def test_a_crafted_program_base_runs_no_code(zoo: Zoo, tmp_path: Path, way: str) -> None:
    program = torch.export.export(zoo.fresh("mlp"), (torch.randn(3, 16),), strict=False)
    torch.export.save(program, tmp_path / "honest.pt2")
    craft(tmp_path / "honest.pt2", tmp_path / "crafted.pt2", way, tmp_path / "marker")
    spec = {"base": {"program": str(tmp_path / "honest.pt2")}, "adapt": [entry("lora", "mlp")]}
    assert adaptc.compile(spec).plan.sites
    spec["base"] = {"program": str(tmp_path / "crafted.pt2")}
    with pytest.raises(adaptc.AdaptcError):
        adaptc.compile(spec)
    assert not (tmp_path / "marker").exists(), "compiling a program ran code from it"
