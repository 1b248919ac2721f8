"""Outputs are put in place whole and together: an error, a full disk or a kill leaves what was there before."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import adaptc
from adaptc.compiler.artifacts import emit as artifacts
from adaptc.compiler.artifacts.emit import emit_all
from adaptc.emit import staging
from adaptc.emit.onnx import export as onnx
from adaptc.emit.staging import Staging
from adaptc.errors import AdaptcError
from adaptc.spec.spec import load
from tests.families import Zoo, entry, marked, perturb

INPUTS = {"x": "float32[batch, 16]"}
ENTRY = {"method": "lora", "target": ["*"], "r": 2}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.second = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


@pytest.fixture(scope="module")
def compiled() -> Any:
    torch.manual_seed(0)
    made = adaptc.compile({"inputs": INPUTS, "adapt": [ENTRY]}, model=Net())
    made.folded_graph()
    return made


def emit(compiled: Any, *entries: dict[str, Any], into: Path) -> list[Path]:
    written = emit_all(compiled.program, load({"emit": list(entries)}).emit, into=into)
    return [artifact.path for artifact in written]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def put(stage: Staging, final: Path, text: str, directory: bool = False) -> None:
    path = stage.path(final)
    if directory:
        path.mkdir()
        path = path / "content"
    path.write_text(text)


# one output


@pytest.mark.parametrize("new", [False, True], ids=["file", "directory"])
@pytest.mark.parametrize("old", [False, True], ids=["over file", "over directory"])
def test_files_and_directories_replace_one_another(tmp_path: Path, old: bool, new: bool) -> None:
    final = tmp_path / "product"
    for directory, text in ((old, "old"), (new, "new")):
        with Staging() as stage:
            put(stage, final, text, directory)
    assert names(tmp_path) == (["product", "product/content"] if new else ["product"])
    assert (final / "content" if new else final).read_text() == "new"


def test_nothing_is_in_place_before_the_end(tmp_path: Path) -> None:
    with Staging() as stage:
        put(stage, tmp_path / "a", "new")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a").read_text() == "new"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError, SystemExit])
def test_an_error_leaves_the_old_output_and_no_litter(tmp_path: Path, error: type[BaseException]) -> None:
    with Staging() as stage:
        put(stage, tmp_path / "file", "old")
        put(stage, tmp_path / "folder", "old", directory=True)
    before = contents(tmp_path)

    def fail() -> None:
        with Staging() as stage:
            put(stage, tmp_path / "file", "new")
            put(stage, tmp_path / "folder", "new", directory=True)
            put(stage, tmp_path / "third", "new")
            raise error

    with pytest.raises(AdaptcError if error is OSError else error):
        fail()
    assert contents(tmp_path) == before
    assert names(tmp_path) == ["file", "folder", "folder/content"]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["disk", "Ctrl-C"]
)
@pytest.mark.parametrize("failing", [1, 2, 3, 4, 5])
def test_a_rename_that_fails_leaves_every_old_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int, error: BaseException
) -> None:
    finals = [tmp_path / "file", tmp_path / "folder", tmp_path / "last"]
    with Staging() as stage:
        for final in finals:
            put(stage, final, "old", directory=final.name == "folder")
    before = contents(tmp_path)
    real, calls = os.replace, 0

    def replace(source: Any, target: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise error
        real(source, target)

    monkeypatch.setattr(staging.os, "replace", replace)
    try:
        with Staging() as stage:
            for final in finals:
                put(stage, final, "new", directory=final.name == "folder")
    except (AdaptcError, KeyboardInterrupt):
        assert contents(tmp_path) == before, "some outputs are new, some old"
    else:
        assert calls < failing, "an output could not be put in place, and nothing was said"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder", "last"]


def test_one_place_can_be_staged_twice(tmp_path: Path) -> None:
    with Staging() as stage:
        first = stage.path(tmp_path / "a")
        first.write_text("first")
        assert stage.staged(tmp_path / "a") == first
        second = stage.path(tmp_path / "a")
        assert first == second or first.read_text() == "first", "staging swept what it had staged itself"
        second.write_text("second")
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "second"


def test_another_run_in_progress_is_not_swept(tmp_path: Path) -> None:
    with Staging() as one:
        put(one, tmp_path / "a", "one")
        with Staging() as two:
            put(two, tmp_path / "a", "two")
    assert (tmp_path / "a").read_text() == "one"
    assert names(tmp_path) == ["a"]


def test_litter_of_a_process_that_had_our_number_is_swept(tmp_path: Path) -> None:
    """In a container every run may have the same process id."""
    with contextlib.suppress(RuntimeError), Staging() as stage:
        made = stage.path(tmp_path / "folder").parent
        raise RuntimeError
    made.mkdir()
    (made / "old").mkdir()
    (made / "old/content").write_text("old")
    with contextlib.suppress(RuntimeError), Staging() as stage:
        stage.path(tmp_path / "folder")
        raise RuntimeError
    assert names(tmp_path) == ["folder", "folder/content"]


@pytest.mark.parametrize("name", ["model[1]", "m*", "a b", "m?del", ".hidden", "ü"])
def test_names_with_odd_characters(tmp_path: Path, name: str) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", KILL, "1", str(tmp_path / name)], capture_output=True, text=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    with Staging() as stage:
        put(stage, tmp_path / name, "new")
    assert names(tmp_path) == [name]


# a kill


KILL = textwrap.dedent(
    """
    import os, pathlib, signal, sys
    from adaptc.emit import staging

    real, left = os.replace, int(sys.argv[1])

    def replace(source, target):
        global left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        real(source, target)

    staging.os.replace = replace
    with staging.Staging() as stage:
        for text in sys.argv[2:]:
            path = stage.path(pathlib.Path(text))
            if text.endswith("folder"):
                path.mkdir()
                path = path / "content"
            path.write_text("new")
    """
)


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("name", ["file", "folder"])
def test_a_kill_costs_nothing(tmp_path: Path, name: str, at: int) -> None:
    """Killed before the rename: all is old. Killed between a folder's two renames: the next run puts it back."""
    final = tmp_path / name
    with Staging() as stage:
        put(stage, final, "old", directory=name == "folder")
    before = contents(tmp_path)
    killed = subprocess.run([sys.executable, "-c", KILL, str(at), str(final)], capture_output=True, text=True)
    if killed.returncode == 0:
        assert at == 2
        assert name == "file"
        return
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    if at == 1:
        assert {k: v for k, v in contents(tmp_path).items() if not k.startswith(".")} == before
    litter = [p for p in tmp_path.iterdir() if p != final]
    assert len(litter) == 1
    assert litter[0].name.startswith(f".{name}.adaptc-")
    with contextlib.suppress(RuntimeError), Staging() as stage:  # the next run sweeps, and then fails itself
        stage.path(final)
        raise RuntimeError
    assert contents(tmp_path) == before
    assert names(tmp_path) == (["folder", "folder/content"] if name == "folder" else ["file"])


def test_a_kill_among_several_outputs_costs_nothing(tmp_path: Path) -> None:
    """Killed after the first of two renames: each output is whole, new or old."""
    finals = [tmp_path / "a", tmp_path / "b"]
    with Staging() as stage:
        for final in finals:
            put(stage, final, "old")
    killed = subprocess.run(
        [sys.executable, "-c", KILL, "2", *map(str, finals)], capture_output=True, text=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [final.read_text() for final in finals] == ["new", "old"]
    with Staging() as stage:
        for final in finals:
            put(stage, final, "third")
    assert names(tmp_path) == ["a", "b"]
    assert [final.read_text() for final in finals] == ["third", "third"]


MODEL = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8))
"""
KILLED_COMPILE = """
import os, signal, sys
from adaptc.emit import staging

def stop(source, target):
    os.kill(os.getpid(), signal.SIGKILL)

staging.os.replace = stop
sys.argv = ["adaptc", "compile", sys.argv[1], "--set", "adapt.0.r=4"]
from adaptc.cli.app import main
main()
"""


@pytest.mark.slow
def test_a_compile_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "kill_model.py").write_text(MODEL)
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        'version: 1\nbase: {python: "kill_model:build"}\ninputs: {input: "float32[batch, 16]"}\n'
        "adapt: [{method: lora, target: all-linear, r: 2}]\n"
        "emit: [{format: peft, path: out/adapter}, {format: onnx, path: out/model.onnx}]\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True)

    first = run("-m", "adaptc.cli.app", "compile", str(spec))
    assert first.returncode == 0, first.stderr
    before = contents(tmp_path / "out")
    assert set(before) == {
        "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/manifest.json",
        "manifest.json", "model.onnx",
    }  # fmt: skip
    killed = run("-c", KILLED_COMPILE, str(spec))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = contents(tmp_path / "out")
    assert {k: v for k, v in left.items() if not k.startswith(".")} == before
    assert len(left) > len(before), "nothing was staged: the kill came too early"
    again = run("-m", "adaptc.cli.app", "compile", str(spec))
    assert again.returncode == 0, again.stderr
    assert set(contents(tmp_path / "out")) == set(before), "litter is left"


# products of a compile


def test_several_products_together(compiled: Any, tmp_path: Path) -> None:
    paths = emit(
        compiled,
        {"format": "torch", "path": "trainable"},
        {"format": "onnx", "path": "model.onnx"},
        {"format": "peft", "path": "adapter"},
        into=tmp_path,
    )
    assert paths == [tmp_path / "trainable", tmp_path / "model.onnx", tmp_path / "adapter"]
    assert names(tmp_path) == [
        "adapter", "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/manifest.json",
        "manifest.json", "model.onnx", "trainable", "trainable/manifest.json", "trainable/program.pt2",
    ]  # fmt: skip


def test_two_programs_in_one_folder(compiled: Any, tmp_path: Path) -> None:
    emit(
        compiled,
        {"format": "onnx", "path": "folded.onnx"},
        {"format": "onnx", "path": "live.onnx", "adapters": "live"},
        {"format": "onnx", "path": "base.onnx", "adapters": "none"},
        into=tmp_path,
    )
    assert names(tmp_path) == ["base.onnx", "folded.onnx", "live.onnx", "manifest.json"]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert {name: product["adapters"] for name, product in manifest["products"].items()} == {
        "folded.onnx": "folded", "live.onnx": "live", "base.onnx": "none",
    }  # fmt: skip


def test_a_second_compile_keeps_other_products_in_the_manifest(compiled: Any, tmp_path: Path) -> None:
    emit(compiled, {"format": "onnx", "path": "folded.onnx"}, into=tmp_path)
    first = json.loads((tmp_path / "manifest.json").read_text())["products"]["folded.onnx"]
    emit(compiled, {"format": "onnx", "path": "base.onnx", "adapters": "none"}, into=tmp_path)
    after = json.loads((tmp_path / "manifest.json").read_text())["products"]
    assert set(after) == {"folded.onnx", "base.onnx"}
    assert after["folded.onnx"] == first


@pytest.mark.parametrize("old", ["{", "[]", '{"products": []}', '{"products": {"a": 1}}', "\xff"])
def test_a_broken_manifest(compiled: Any, tmp_path: Path, old: str) -> None:
    """Written anew, or refused in words."""
    (tmp_path / "manifest.json").write_bytes(old.encode("latin-1"))
    try:
        emit(compiled, {"format": "onnx", "path": "base.onnx", "adapters": "none"}, into=tmp_path)
    except AdaptcError:
        assert (tmp_path / "manifest.json").read_bytes() == old.encode("latin-1")
    else:
        assert "base.onnx" in json.loads((tmp_path / "manifest.json").read_text())["products"]


def test_a_manifest_of_the_users_own(compiled: Any, tmp_path: Path) -> None:
    """Web applications have a manifest.json too."""
    own = {"name": "my application", "icons": [], "start_url": "/"}
    (tmp_path / "manifest.json").write_text(json.dumps(own))
    with contextlib.suppress(AdaptcError):
        emit(compiled, {"format": "onnx", "path": "base.onnx", "adapters": "none"}, into=tmp_path)
    now = json.loads((tmp_path / "manifest.json").read_text())
    assert own.items() <= now.items(), "the user's own manifest is gone"


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From now on, the disk is full half-way through a checkpoint."""

    def half(compiled: Any, entry: Any, stage: Staging, final: Path) -> None:
        directory = stage.path(final)
        directory.mkdir(exist_ok=True)
        (directory / "adapter_model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    return lambda: monkeypatch.setitem(artifacts.WRITERS, "peft", half)


def test_the_last_product_fails(compiled: Any, tmp_path: Path, fails: Callable[[], None]) -> None:
    entries = [
        {"format": "onnx", "path": "out/m.onnx", "adapters": "none"},
        {"format": "peft", "path": "out/a"},
    ]
    emit(compiled, *entries, into=tmp_path)
    before = contents(tmp_path)
    fails()
    with pytest.raises((OSError, AdaptcError)):
        emit(compiled, *entries, into=tmp_path)
    assert contents(tmp_path) == before
    assert not [name for name in names(tmp_path) if "adaptc-" in name]


def test_the_last_product_fails_the_first_time(
    compiled: Any, tmp_path: Path, fails: Callable[[], None]
) -> None:
    fails()
    with pytest.raises((OSError, AdaptcError)):
        emit(
            compiled,
            {"format": "onnx", "path": "out/m.onnx", "adapters": "none"},
            {"format": "peft", "path": "out/a"},
            into=tmp_path,
        )
    assert contents(tmp_path) == {}
    assert names(tmp_path) == [], "an empty folder is left"


def test_a_full_disk_is_an_error_in_words(compiled: Any, tmp_path: Path, fails: Callable[[], None]) -> None:
    fails()
    with pytest.raises(AdaptcError, match="No space left on device"):
        emit(compiled, {"format": "peft", "path": "a"}, into=tmp_path)


FORMATS = ["onnx", "onnx, weights beside it", "torch", "peft", "hf"]


@pytest.fixture(params=marked(FORMATS, ("onnx, weights beside it", "peft", "hf")))
def product(
    request: pytest.FixtureRequest, zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], None]:
    """Writes one format of a real model, again and again to the same place."""
    if "beside" in request.param:
        monkeypatch.setattr(onnx, "INLINE_LIMIT", 1000)
    compiled = zoo.compiled("bert", [entry("lora", "bert")])
    perturb(compiled.module)
    return lambda: compiled.emit(request.param.partition(",")[0], tmp_path / "product")


def test_no_format_leaves_anything_on_a_full_disk(product: Callable[[], None], tmp_path: Path) -> None:
    """The system lets no file grow beyond half of what it must be, whoever writes it."""
    resource = pytest.importorskip("resource", reason="this system does not limit files")
    product()
    before = contents(tmp_path)
    limit = max(map(len, before.values())) // 2
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        with pytest.raises(
            AdaptcError, match=r"^cannot write: .*File too large.*; every earlier output is unchanged"
        ):
            product()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert contents(tmp_path) == before
    assert not [name for name in names(tmp_path) if "adaptc-" in name]
    product()


@pytest.mark.parametrize("product", marked(FORMATS, ["peft"]), indirect=True)
def test_no_format_is_written_to_a_read_only_folder(
    product: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    product()
    before = contents(tmp_path)

    def refuse(*args: Any, **kwargs: Any) -> str:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(staging.tempfile, "mkdtemp", refuse)
    with pytest.raises(AdaptcError) as caught:
        product()
    assert str(caught.value) == f"cannot write to {tmp_path}: Read-only file system"
    assert contents(tmp_path) == before


# what is the user's own


def test_one_product_inside_another(compiled: Any, tmp_path: Path) -> None:
    """Refused, or both there; twice, because the second time the outer folder is replaced."""
    entries = [
        {"format": "torch", "path": "build"},
        {"format": "onnx", "path": "build/m.onnx", "adapters": "none"},
    ]
    for _ in range(2):
        try:
            emit(compiled, *entries, into=tmp_path)
        except AdaptcError:
            assert contents(tmp_path) == {}
        else:
            assert {"build/m.onnx", "build/program.pt2"} <= set(contents(tmp_path))
            products_ = json.loads((tmp_path / "build/manifest.json").read_text())["products"]
            assert set(products_) == {"m.onnx", "program.pt2"}
            assert adaptc.load(tmp_path / "build")


@pytest.mark.parametrize("form", ["peft", "torch"])
def test_a_folder_with_files_of_the_users_own(compiled: Any, tmp_path: Path, form: str) -> None:
    """A directory that adaptc did not write is not thrown away: refused, or the files are kept."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work/thesis.txt").write_text("three years")
    with contextlib.suppress(AdaptcError):
        emit(compiled, {"format": form, "path": "work"}, into=tmp_path)
    assert (tmp_path / "work/thesis.txt").exists(), "the user's own files are gone"
    assert (tmp_path / "work/thesis.txt").read_text() == "three years"


@pytest.mark.parametrize("path", [".", "..", "sub/.."])
def test_the_folder_of_the_spec_itself(compiled: Any, tmp_path: Path, path: str) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "spec.yaml").write_text("mine")
    with contextlib.suppress(AdaptcError):
        emit(compiled, {"format": "peft", "path": path}, into=folder)
    assert (folder / "spec.yaml").exists(), "the spec itself is gone"


def test_a_program_over_a_folder(compiled: Any, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").mkdir()
    (tmp_path / "m.onnx/thesis.txt").write_text("three years")
    with contextlib.suppress(AdaptcError):
        emit(compiled, {"format": "onnx", "path": "m.onnx", "adapters": "none"}, into=tmp_path)
    assert (tmp_path / "m.onnx/thesis.txt").exists(), "the user's own files are gone"


def test_a_program_over_the_spec(tmp_path: Path) -> None:
    (tmp_path / "over_model.py").write_text(MODEL)
    sys.path.insert(0, str(tmp_path))
    try:
        text = (
            'version: 1\nbase: {python: "over_model:build"}\ninputs: {input: "float32[batch, 16]"}\n'
            "adapt: [{method: lora, target: all-linear, r: 2}]\nemit: [{format: onnx, path: ./spec.yaml}]\n"
        )
        path = tmp_path / "spec.yaml"
        path.write_text(text)
        made = adaptc.compile(path)
        with pytest.raises(AdaptcError, match=r"spec\.yaml"):
            emit_all(made.program, made.spec.emit)
        assert path.read_text() == text
    finally:
        sys.path.remove(str(tmp_path))


def test_a_product_called_manifest(compiled: Any, tmp_path: Path) -> None:
    with pytest.raises(AdaptcError, match=r"manifest\.json"):
        emit(compiled, {"format": "onnx", "path": "manifest.json", "adapters": "none"}, into=tmp_path)


def test_through_a_symbolic_link(compiled: Any, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    emit(compiled, {"format": "peft", "path": "link/adapter"}, into=tmp_path)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real/adapter/adapter_config.json").is_file()
