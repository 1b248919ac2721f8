"""A method and a pass of an installed package get all that the built-in ones get."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
MODEL = """\
import torch
from torch import nn


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))
"""
SPEC = """\
version: 1
base: {python: "plugin_model:build"}
inputs: {input: "float32[batch, 16]"}
adapt:
  - {method: diag-shift, target: "*", gain: 0.5}
"""
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as pip installs it, in a folder of its own."""
    source = tmp_path_factory.mktemp("source") / "plugin"
    shutil.copytree(HERE, source, ignore=shutil.ignore_patterns("__pycache__", "test_*"))
    target = tmp_path_factory.mktemp("site")
    words = [
        "install",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--target",
        str(target),
        str(source),
    ]
    ran = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    (target / "plugin_model.py").write_text(MODEL)
    return target


@pytest.fixture
def python(installed: Path, tmp_path: Path) -> Run:
    """Run Python where the package is installed."""

    def run(*words: object, plugin: bool = True) -> subprocess.CompletedProcess[str]:
        path = str(installed) if plugin else ""
        environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "250", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *map(str, words)]
        return subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300
        )

    return run


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "spec.yaml"
    path.write_text(SPEC)
    return path


COMMANDS = """
import contextlib, io, json, sys

import adaptc
from adaptc.cli.commands import app
from adaptc.spec.spec import load


def said(*words):
    with contextlib.redirect_stdout(io.StringIO()) as text:
        app(list(words), standalone_mode=False)
    return text.getvalue()


def refused(text):
    open("spec.yaml", "w").write(text)
    try:
        load("spec.yaml")
    except adaptc.AdaptcError as error:
        return str(error)


texts = {name: said(*name.split()) for name in ("methods --json", "passes --json", "schema")}
errors = {what: refused(text) for what, text in json.loads(sys.argv[1]).items()}
print(json.dumps(texts | errors))
"""
MISTAKES = {
    "a value": ("gain: 0.5", "gain: -1", "spec.yaml:5:45: adapt.0.gain: must be greater than 0, got -1"),
    "an option": ("gain: 0.5", "gian: 1", "unknown key 'gian'; did you mean 'gain'?"),
    "a name": ("diag-shift", "diag-shfit", "unknown method 'diag-shfit'; did you mean 'diag-shift'?"),
}


def test_the_registries_the_schema_and_errors_know_it(python: Run) -> None:
    """All in one process, since a start takes seconds."""
    specs = {what: SPEC.replace(old, new) for what, (old, new, _) in MISTAKES.items()}
    ran = python("-c", COMMANDS, json.dumps(specs))
    assert ran.returncode == 0, ran.stderr
    texts = json.loads(ran.stdout)
    row = next(row for row in json.loads(texts["methods --json"]) if row["method"] == "diag-shift")
    assert row["equation"].startswith("W' = W + gain r c")
    assert row["options"] == "gain"
    assert row["sits on"] == "linear"
    assert {"swap-activation", "insert-diag-shift"} <= {
        row["pass"] for row in json.loads(texts["passes --json"])
    }
    assert "diag-shift" in texts["schema"]
    assert "a factor on what is added" in texts["schema"]
    for what, (_, _, words) in MISTAKES.items():
        assert words in texts[what], what


@pytest.mark.slow
def test_without_the_package(python: Run, spec: Path) -> None:
    ran = python("-m", "adaptc.cli.app", "plan", spec, plugin=False)
    assert ran.returncode == 2
    assert f"{spec}:5:14: adapt.0.method: unknown method 'diag-shift'" in ran.stderr


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import no_such_module_at_all", "no_such_module_at_all"),
        ("from adaptc.methods.method import method\n@method('Bad Name')\nclass Bad: ...", "Bad Name"),
    ],
    ids=["does not import", "a name that is none"],
)
def test_a_package_that_is_broken(tmp_path: Path, code: str, said: str) -> None:
    """It is named, in words, and the command line goes on to say what to do."""
    (tmp_path / "broken_plugin.py").write_text(code)
    folder = tmp_path / "broken_plugin-0.1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-plugin\nVersion: 0.1\n")
    (folder / "entry_points.txt").write_text("[adaptc.passes]\nbroken = broken_plugin\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    words = [sys.executable, "-m", "adaptc.cli.app", "schema"]
    ran = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert "Traceback" not in ran.stderr, ran.stderr[-600:]
    assert "broken-plugin" in ran.stderr or "broken_plugin" in ran.stderr
    assert said in ran.stderr


WHOLE = """
import json, sys, warnings
import torch
import adaptc

torch.set_num_threads(1)
compiled = adaptc.compile(sys.argv[1])
module = compiled.module
names = [name for name, p in module.named_parameters() if p.requires_grad]
assert names == ["0.diag_r.default", "0.diag_c.default", "2.diag_r.default", "2.diag_c.default"], names

# at initialisation, it computes what the base computes
import plugin_model
base = plugin_model.build()
x = torch.randn(5, 16)
assert torch.equal(module(input=x), base(x))

# trains
y = torch.randn(5, 8)
optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=0.05)
losses = []
for _ in range(5):
    optimizer.zero_grad()
    loss = (module(input=x) - y).pow(2).mean()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < losses[0], losses
for name, p in module.named_parameters():
    assert p.requires_grad == (p.grad is not None), name
    if not p.requires_grad:
        assert torch.equal(p, dict(base.named_parameters())[name]), name

# computes what it states
module.eval()
trained = module(input=x).detach()
values = dict(module.named_parameters())
def linear(h, name):
    W = values[name + ".weight"] + 0.5 * values[name + ".diag_r.default"] * values[name + ".diag_c.default"]
    return h @ W.T + values[name + ".bias"]
expected = linear(torch.relu(linear(x, "0")), "2").detach()
assert torch.allclose(trained, expected, atol=1e-5)

# folds
folded = compiled.fold()
assert torch.allclose(folded(input=x), trained, atol=1e-5)
assert list(folded.state_dict()) == list(base.state_dict())

# ONNX, folded and live
import onnxruntime
for adapters in ("folded", "live"):
    compiled.emit("onnx", f"{adapters}.onnx", adapters=adapters)
    got = onnxruntime.InferenceSession(f"{adapters}.onnx").run(None, {"input": x.numpy()})[0]
    assert abs(got - trained.numpy()).max() < 1e-5, adapters

# a checkpoint of adaptc's own, read back by a spec and into a module
compiled.save_adapter("adapter")
config = json.load(open("adapter/adapter_config.json"))
assert config["adaptc_method"] == "diag-shift", config
assert config["adaptc_options"]["gain"] == 0.5, config
spec = json.loads(json.dumps(adaptc.Spec.model_validate(compiled.spec).model_dump(mode="json", exclude_none=True)))
again = adaptc.compile(
    {"base": spec["base"], "inputs": {"input": "float32[batch, 16]"}, "adapt": [{"adapter": "adapter"}]}
)
assert torch.allclose(again.module.eval()(input=x), trained, atol=1e-6)
fresh = adaptc.compile(sys.argv[1]).module.eval()
assert not torch.allclose(fresh(input=x), trained, atol=1e-3)
adaptc.load_adapter(fresh, "adapter")
assert torch.allclose(fresh(input=x), trained, atol=1e-6)

# an artifact
compiled.emit("torch", "trainable")
loaded = adaptc.load("trainable").eval()
assert torch.allclose(loaded(input=x), trained, atol=1e-6)
assert [n for n, p in loaded.named_parameters() if p.requires_grad] == names
adaptc.save_adapter(loaded, "second")
adaptc.load_adapter(fresh, "second")
print("everything held")
"""


def test_the_method_gets_everything(python: Run, spec: Path, tmp_path: Path) -> None:
    (tmp_path / "whole.py").write_text(WHOLE)
    ran = python(tmp_path / "whole.py", spec)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.strip().endswith("everything held")


@pytest.mark.slow
def test_its_checkpoint_without_the_package(python: Run, spec: Path, tmp_path: Path, installed: Path) -> None:
    saved = python("-c", f"import adaptc; adaptc.compile({str(spec)!r}).save_adapter('adapter')")
    assert saved.returncode == 0, saved.stderr
    (tmp_path / "plugin_model.py").write_text(MODEL)
    spec.write_text(SPEC[: SPEC.index("adapt:")] + "adapt: [{adapter: adapter}]\n")
    ran = python("-c", f"import adaptc; adaptc.compile({str(spec)!r})", plugin=False)
    assert ran.returncode != 0
    assert "method 'diag-shift' is not installed; install the package that has it" in ran.stderr


PASSES = """
import sys
import torch
import adaptc
import plugin_model

torch.set_num_threads(1)
base = plugin_model.build()
x = torch.randn(5, 16)
for name, function in (("gelu", torch.nn.functional.gelu), ("silu", torch.nn.functional.silu)):
    compiled = adaptc.compile(sys.argv[1], overrides=[f"passes=[{{swap-activation: {{to: {name}}}}}, insert]"])
    assert compiled.plan.pipeline == ["swap-activation", "insert-diag-shift"]
    expected = base[2](function(base[0](x)))
    for module in (compiled.module.eval(), compiled.fold()):
        assert torch.allclose(module(input=x), expected, atol=1e-6), name

graph = adaptc.trace(base, (x,))
swapped = adaptc.run(graph, [adaptc.passes.SwapActivation(to="silu"), adaptc.passes.InsertDiagShift(target="*")])
assert "aten.silu.default" in swapped.operations and "aten.relu.default" not in swapped.operations
assert "aten.relu.default" in graph.operations

for setting in ("passes=[swap-activation, swap-activation, insert]", "passes=[{swap-activation: {too: gelu}}, insert]"):
    try:
        adaptc.compile(sys.argv[1], overrides=[setting])
    except adaptc.AdaptcError as error:
        print(type(error).__name__, error)
    else:
        raise SystemExit("not refused: " + setting)
"""


@pytest.mark.slow
def test_the_pass_by_name_with_options(python: Run, spec: Path, tmp_path: Path) -> None:
    (tmp_path / "passes.py").write_text(textwrap.dedent(PASSES))
    ran = python(tmp_path / "passes.py", spec)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "RefusedError swap-activation: the model has no relu" in ran.stdout
    assert "its options: to" in ran.stdout


@pytest.mark.slow
def test_the_pass_from_the_command_line(python: Run, spec: Path, tmp_path: Path) -> None:
    text = "passes:\n  - swap-activation: {to: silu}\n  - insert\nemit: [{format: onnx, path: m.onnx}]\n"
    spec.write_text(SPEC + text)
    ran = python("-m", "adaptc.cli.app", "compile", spec, "--json", "--print-after", "swap-activation")
    assert ran.returncode == 0, ran.stderr
    document = json.loads(ran.stdout)
    assert document["plan"]["passes"] == [{"swap-activation": {"to": "silu"}}, "insert"]
    import onnx

    operations = [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node]
    assert "Relu" not in operations
    assert "Sigmoid" in operations or "Swish" in operations
