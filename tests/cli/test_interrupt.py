"""Ctrl-C: exit code 130, nothing said, and every earlier output whole, wherever it lands."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import adaptc
from adaptc.compiler.artifacts.emit import emit_all

MODEL = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8))
"""
SPEC = """
version: 1
base: {python: "interrupted_model:build"}
inputs: {input: "float32[batch, 16]"}
adapt: [{method: lora, target: all-linear, r: 2}]
emit:
  - {format: peft, path: out/adapter}
  - {format: torch, path: out/trainable}
  - {format: onnx, path: out/model.onnx}
"""
PROGRAM = """
import os, signal, sys, threading
from adaptc.cli.app import start

def interrupt(times=1):
    for _ in range(times):
        os.kill(os.getpid(), signal.SIGINT)

def before(owner, name, act=interrupt, call=1):
    real, calls = getattr(owner, name), []
    def replaced(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            act()
        return real(*args, **kwargs)
    setattr(owner, name, replaced)

class Importing:
    def __init__(self, name):
        self.name = name
    def find_spec(self, name, *_):
        if name == self.name:
            interrupt()

def thread():
    worker = threading.Thread(target=interrupt)
    worker.start()
    worker.join()

def swallowed():
    class Dying:
        def __del__(self):
            interrupt()
    Dying()
    try:
        interrupt()
    except:
        pass

sys.argv = ["adaptc", *sys.argv[1:]]
{moment}
start()
"""
MOMENTS = {
    "typer is imported": "sys.meta_path.insert(0, Importing('typer'))",
    "torch is imported": "sys.meta_path.insert(0, Importing('torch.nn'))",
    "the exporter is imported": "sys.meta_path.insert(0, Importing('onnxscript.optimizer'))",
    "a registry is read": "sys.meta_path.insert(0, Importing('adaptc.passes.insert.lora'))",
    "tracing": "import torch; before(torch.export, 'export')",
    "within the model": "import torch; before(torch.nn.Linear, 'forward')",
    "within the model, traced": "import torch; before(torch.nn.Linear, 'forward', call=8)",
    "in a thread": "import torch; before(torch.export, 'export', thread)",
    "code that swallows errors": "import torch; before(torch.export, 'export', swallowed)",
    "exporting": "from adaptc.emit.onnx import export; before(export, '_clean_up')",
    "proving": "import onnxruntime; before(onnxruntime, 'InferenceSession')",
    "staging": "from adaptc.emit import staging; before(staging.tempfile, 'mkdtemp')",
    "writing": "from adaptc.emit import manifest; before(manifest, 'sha256_of_files', call=3)",
    "twice": "from adaptc.emit.onnx import export; before(export, '_clean_up', lambda: interrupt(2))",
    "removing": (
        "from adaptc.emit import staging; from adaptc.emit.onnx import export; "
        "before(export, '_clean_up', lambda: (before(staging.shutil, 'rmtree'), interrupt()))"
    ),
}
"""When it comes -> the code that sends it then."""
QUICK = {"typer is imported", "code that swallows errors"}
"""What stands for the others: before anything, and where no exception gets out."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A spec and what was compiled from it."""
    folder = tmp_path_factory.mktemp("interrupted")
    (folder / "interrupted_model.py").write_text(MODEL)
    (folder / "spec.yaml").write_text(SPEC)
    compiled = adaptc.compile(folder / "spec.yaml")
    emit_all(compiled.program, compiled.spec.emit)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def command(folder: Path, moment: str) -> list[str]:
    code = PROGRAM.replace("{moment}", moment)
    return [sys.executable, "-c", code, "compile", str(folder / "spec.yaml"), "--set", "adapt.0.r=4"]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def check(code: int, error: str) -> None:
    assert code == 130, error
    for word in ("Traceback", "Error", "Abort", "Exception", "Interrupt"):
        assert word not in error, error


@pytest.mark.parametrize(
    "moment", [pytest.param(m, marks=[] if m in QUICK else [pytest.mark.slow]) for m in MOMENTS]
)
def test_it_ends_silently(built: Path, moment: str) -> None:
    before = contents(built / "out")
    ran = subprocess.run(
        command(built, MOMENTS[moment]), capture_output=True, text=True, env=environment(), cwd=Path.cwd()
    )
    check(ran.returncode, ran.stderr)
    assert contents(built / "out") == before, "an output was changed, or litter is left"


@pytest.mark.slow
def test_outputs_are_put_in_place_together(built: Path, tmp_path: Path) -> None:
    """While they are renamed it waits: all are new then, and none is left out."""
    import json
    import shutil

    shutil.copytree(built, tmp_path / "copy")
    folder = tmp_path / "copy"
    before = contents(folder / "out")
    moment = "from adaptc.emit import staging; before(staging.os, 'replace', call=3)"
    ran = subprocess.run(command(folder, moment), capture_output=True, text=True, env=environment())
    check(ran.returncode, ran.stderr)
    after = contents(folder / "out")
    assert set(after) == set(before)
    assert json.loads(after["manifest.json"])["spec"]["adapt"][0]["r"] == 4
    for name in ("adapter/adapter_config.json", "trainable/program.pt2", "model.onnx"):
        assert after[name] != before[name]


@pytest.mark.slow
def test_folders_made_for_outputs_are_removed(built: Path, tmp_path: Path) -> None:
    words = [*command(built, MOMENTS["exporting"]), "--output-dir", str(tmp_path / "a" / "b")]
    ran = subprocess.run(words, capture_output=True, text=True, env=environment())
    check(ran.returncode, ran.stderr)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_after_the_end_it_changes_nothing(built: Path, tmp_path: Path) -> None:
    words = [
        sys.executable,
        "-c",
        "import atexit, os, signal\natexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))\n",
    ]
    words[-1] += PROGRAM.replace("{moment}", "")
    ran = subprocess.run([*words, "schema"], capture_output=True, text=True, env=environment())
    assert (ran.returncode, ran.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.4, 0.8, 1.6, 2.4, 3.2, 4.0])
def test_at_any_time(built: Path, seconds: float) -> None:
    """By the clock. A compile that was done before tells 0."""
    words = [sys.executable, "-m", "adaptc.cli.app", "compile", str(built / "spec.yaml")]
    before = contents(built / "out")
    running = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    time.sleep(seconds)
    running.send_signal(signal.SIGINT)
    time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, error = running.communicate(timeout=120)
    if running.returncode != 0:
        check(running.returncode, error)
        assert set(contents(built / "out")) == set(before)
