"""adaptc without its extras: what needs none works, and what needs one says how to install it."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from typing import Any

import pytest

from adaptc.optional import EXTRAS, MissingPackageError, optional
from tests.test_architecture import ALL, ROOT, is_type_checking, shown, tree

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BLOCKED = (
    *("transformers", "huggingface_hub", "tokenizers", "bitsandbytes", "peft", "accelerate"),
    *("sentence_transformers", "matplotlib", "scipy", "sklearn", "pandas"),
)
"""What a wheel alone does not bring."""


# the law


def canonical(requirement: str) -> str:
    """`ruamel.yaml>=0.18; python_version` -> `ruamel-yaml`."""
    return re.sub(r"[-_.]+", "-", re.split(r"[ ;<>=!~\[]", requirement)[0]).lower()


def installed_with_adaptc() -> set[str]:
    """The modules of every package that a wheel of adaptc alone brings, through packages of packages."""
    wanted, seen = [canonical(text) for text in PROJECT["dependencies"]], set[str]()
    while wanted:
        name = wanted.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            needs = requires(name) or []
        except PackageNotFoundError:
            continue  # of another platform
        wanted += [canonical(text) for text in needs if "extra ==" not in text]
    distributions = packages_distributions()
    return {
        module for module, owners in distributions.items() if {canonical(owner) for owner in owners} & seen
    }


def imports(node: ast.AST) -> Iterator[tuple[str, int]]:
    """Top-level names of what is imported below a node, by statement or by `import_module`, but not for types alone."""
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            continue
        if isinstance(child, ast.Import):
            yield from ((alias.name.split(".")[0], child.lineno) for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.module:
            yield child.module.split(".")[0], child.lineno
        elif isinstance(child, ast.Call) and ast.unparse(child.func).endswith("import_module"):
            name = child.args[0]
            if isinstance(name, ast.Constant):
                yield str(name.value).split(".")[0], child.lineno
        yield from imports(child)


def not_brought(module: ast.Module, there: set[str]) -> list[tuple[str, int]]:
    return [found for found in imports(module) if found[0] not in there]


def test_every_optional_import_goes_through_one_function() -> None:
    there = installed_with_adaptc() | set(sys.stdlib_module_names) | {"adaptc"}
    assert {"torch", "numpy", "onnx_ir", "ruamel"} <= there
    assert not {"transformers", "peft", "bitsandbytes", "matplotlib"} & there
    breaches = [
        f"{shown(path)}:{line} {name}" for path in ALL for name, line in not_brought(tree(path), there)
    ]
    assert not breaches, "import it by adaptc.optional.optional"


def test_the_law_has_teeth() -> None:
    text = "import torch, peft\nfrom transformers import AutoModel\ndef f():\n    import_module('matplotlib.pyplot')\n"
    assert not_brought(ast.parse(text), {"torch"}) == [("peft", 1), ("transformers", 2), ("matplotlib", 4)]
    assert not not_brought(ast.parse("if TYPE_CHECKING:\n    import peft"), set())


def test_every_extra_is_one_of_the_project() -> None:
    extras = PROJECT["optional-dependencies"]
    assert set(EXTRAS.values()) <= set(extras)
    assert {canonical(text) for name in ("hf", "quant") for text in extras[name]} <= set(EXTRAS)


# the function


def test_a_package_that_is_there() -> None:
    assert optional("transformers.conversion_mapping").get_model_conversion_mapping


def test_a_package_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        MissingPackageError, match="this needs no_such_thing, which is not installed"
    ) as caught:
        optional("no_such_thing.part")
    assert caught.value.notes == ("pip install 'no_such_thing'",)


def test_a_version_that_lacks_a_module() -> None:
    with pytest.raises(
        MissingPackageError, match=r"and transformers [\d.]+.* as it is installed cannot give it"
    ) as caught:
        optional("transformers.no_such_module")
    assert caught.value.notes == ("pip install --upgrade 'adaptc[hf]'",)


# journeys

JOURNEYS = r"""
import json, sys, warnings
from pathlib import Path

warnings.simplefilter("ignore")


class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, *rest):
        return None if name.split(".")[0] in BLOCKED else self.finder.find_spec(name, *rest)


sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]

import torch
torch.set_num_threads(1)
import adaptc
from adaptc.cli import app as cli

folder = Path(sys.argv[1])
said = {}


def command(name, *words):
    import contextlib, io
    out, err, code = io.StringIO(), io.StringIO(), 0
    sys.argv = ["adaptc", *map(str, words)]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as exit:
            code = exit.code or 0
    said[name] = [code, out.getvalue(), err.getvalue()]


(folder / "own_model.py").write_text('''
import torch

def build():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))
''')
(folder / "own.yaml").write_text('''
version: 1
base: {python: "own_model:build"}
inputs: {input: "float32[batch, 64]"}
adapt:
  - {method: lora, target: "0", r: 2}
emit:
  - {format: torch, path: build/trainable}
  - {format: onnx, path: build/model.onnx}
  - {format: onnx, path: build/live.onnx, adapters: live}
  - {format: peft, path: build/adapter}
''')
(folder / "hf").mkdir()
(folder / "hf" / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
(folder / "hf.yaml").write_text('''
version: 1
base: {model: ./hf}
adapt: [{method: lora, target: all-linear, r: 2}]
emit: [{format: onnx, path: hf.onnx}]
''')
(folder / "bits.yaml").write_text((folder / "own.yaml").read_text().partition("emit:")[0] + '''
quantize: [{method: nf4, target: "2", block_size: 64}]
emit: [{format: onnx, path: bits/model.onnx, adapters: live}]
''')
command("compile", "compile", folder / "own.yaml")
command("bits", "compile", folder / "bits.yaml")
command("plan hf", "plan", folder / "hf.yaml")
command("compile hf", "compile", folder / "hf.yaml")
command("init", "init", folder / "hf")
command("inspect", "inspect", folder / "hf")
command("methods", "methods", "--json")
command("schemes", "schemes", "--json")
command("passes", "passes", "--json")
command("schema", "schema")
for name in ("trainable", "model.onnx", "live.onnx", "adapter"):
    command(f"verify {name}", "verify", folder / "build" / name)
    command(f"inspect {name}", "inspect", folder / "build" / name)
if said["compile"][0]:
    sys.exit(said["compile"][2])
module = adaptc.load(folder / "build" / "trainable")
module(torch.randn(2, 64)).sum().backward()
adaptc.load_adapter(module, folder / "build" / "adapter")
adaptc.save_adapter(module, folder / "saved")
try:
    adaptc.TrainingStep(module).callback()
except adaptc.AdaptcError as error:
    said["callback"] = [error.exit_code, "", str(error)]
print(json.dumps(said))
"""


def journeys(python: Path, folder: Path, blocked: tuple[str, ...] = ()) -> dict[str, Any]:
    """Every journey in a process of its own: name -> exit code, standard output, standard error."""
    code = f"BLOCKED = {blocked!r}\n{JOURNEYS}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if not blocked:
        del environment["PYTHONPATH"]  # an environment of its own has adaptc installed
    ran = subprocess.run(
        [str(python), "-c", code, str(folder)], capture_output=True, text=True, env=environment, cwd=folder
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


def check(said: dict[str, Any]) -> None:
    """What needs no extra works; what needs one names it, and the command that installs it."""
    missing = {"plan hf", "compile hf", "callback"}
    for name, (code, _, error) in said.items():
        assert "Traceback" not in error, error
        if name not in missing:
            assert code == 0, (name, error)
    for name in missing:
        code, _, error = said[name]
        assert code == (1 if name == "callback" else 2), error
        assert "this needs transformers, which is not installed" in error
        assert "pip install 'adaptc[hf]'" in error
    assert "hf.yaml:3:15" in said["plan hf"][2]
    assert "model: ./hf" in said["init"][1]


@pytest.mark.slow
def test_journeys_without_extras(tmp_path: Path) -> None:
    check(journeys(Path(sys.executable), tmp_path, BLOCKED))


@pytest.mark.slow
def test_the_wheel_alone_in_a_new_environment(tmp_path: Path) -> None:
    """Built, installed with nothing but what it declares, and run: no package of this environment is in reach."""
    source, alone = tmp_path / "source", {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    for name in ("adaptc", "passes"):
        shutil.copytree(ROOT / name, source / name, symlinks=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = ["-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([sys.executable, *build, str(source)], check=True, env=alone)
    wheel = next(tmp_path.glob("adaptc-*.whl"))
    venv.create(tmp_path / "new", with_pip=True)
    python = tmp_path / "new" / "bin" / "python"
    install = [
        "-m",
        "pip",
        "install",
        "-q",
        "--disable-pip-version-check",
        "-c",
        str(ROOT / "constraints.txt"),
    ]
    subprocess.run([str(python), *install, str(wheel)], check=True, env=alone)
    listed = subprocess.run(
        [str(python), "-m", "pip", "list", "--format", "json"], capture_output=True, text=True, env=alone
    )
    names = {canonical(package["name"]) for package in json.loads(listed.stdout)}
    assert "adaptc" in names
    assert not names & {canonical(name) for name in BLOCKED}
    (tmp_path / "work").mkdir()
    check(journeys(python, tmp_path / "work"))
