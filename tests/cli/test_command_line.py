"""The command line as a person meets it: help, version, verbosity, tables, colours, plugins, errors."""

from __future__ import annotations

import io
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from adaptc.cli.listings import described, method_rows
from adaptc.cli.tables import GAP, Fitted, column_widths
from adaptc.cli.verbosity import LOGGER, set_verbosity
from adaptc.methods.method import METHODS
from tests.command_line import run

MODEL = """\
import torch
from torch import nn


def build():
    return nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 16))
"""
METHOD = """\
from dataclasses import dataclass
from adaptc import Param, WeightMethod, method


@method("own-gain")
@dataclass(frozen=True)
class OwnGain(WeightMethod):
    \"\"\"W' = diag(g) W        g (out, 1)\"\"\"

    kinds = frozenset({"linear"})

    def params(self, site):
        return {"g": Param((site.out_features, 1), "ones", "g")}

    def weight(self, W, *, g):
        return g * W
"""
SPEC = """\
version: 1
base: {python: "command_line_model:build"}
inputs: {input: "float32[batch, 16]"}
plugins: [./own_gain.py]
adapt:
  - {method: own-gain, target: all-linear}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a model, a method in a file, and a spec that names both; what is registered is taken out again."""
    for name, text in (("command_line_model.py", MODEL), ("own_gain.py", METHOD), ("spec.yaml", SPEC)):
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    if "own-gain" in METHODS:
        METHODS.forget("own-gain")
    sys.modules.pop("command_line_model", None)


@pytest.fixture(autouse=True)
def _as_loud_as_before() -> Iterator[None]:
    level = LOGGER.level
    yield
    LOGGER.setLevel(level)


def test_it_is_a_module_too() -> None:
    words = [sys.executable, "-m", "adaptc", "--version"]
    ran = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout) == (0, "adaptc 0.1.0\n"), ran.stderr


@pytest.mark.parametrize("words", [["-h"], ["plan", "-h"], ["methods", "--help"]])
def test_help(words: list[str]) -> None:
    ran = run(*words)
    assert ran.code == 0
    assert "Usage: adaptc" in ran.out
    assert "--quiet" in ran.out
    assert max(map(len, ran.out.splitlines())) <= 80


def test_a_shell_completes_names_of_methods() -> None:
    assert "--install-completion" in run("-h").out
    environment = {
        **os.environ,
        "_ADAPTC_COMPLETE": "complete_bash",
        "COMP_WORDS": "adaptc methods lo",
        "COMP_CWORD": "2",
    }
    words = [
        sys.executable,
        "-c",
        "import sys; sys.argv = ['adaptc']; from adaptc.cli.app import main; main()",
    ]
    ran = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=60)
    assert ran.stdout.split() == ["loha", "lokr", "lora"], ran.stderr


def test_colours_are_off_under_no_color() -> None:
    """They are on where a terminal is asked for, so that the test can fail."""
    colour = re.compile(r"\x1b\[[0-9;]*3[0-7][0-9;]*m")
    words = [sys.executable, "-m", "adaptc", "plan", "-h"]
    shown = {}
    for name in ("FORCE_COLOR", "NO_COLOR"):
        environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "TERM")}
        environment |= {"FORCE_COLOR": "1", "TERM": "xterm-256color"} | ({name: "1"})
        shown[name] = subprocess.run(
            words, capture_output=True, text=True, env=environment, timeout=60
        ).stdout
    assert colour.search(shown["FORCE_COLOR"])
    assert not colour.search(shown["NO_COLOR"])


# tables


@pytest.mark.parametrize("words", [["methods"], ["methods", "lora"], ["schemes"], ["passes"]])
def test_tables_fit_eighty_columns_and_break_no_word(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    narrow = run(*words).out
    monkeypatch.setenv("COLUMNS", "400")
    wide = run(*words).out
    assert max(map(len, narrow.splitlines())) <= 80
    assert set(narrow.split()) == set(wide.split()), "a word was broken"


def test_columns_share_what_is_left() -> None:
    rows = [["name", "about"], ["a", "one two three four five six"]]
    assert column_widths(rows, 80) == [4, 27]
    narrow = column_widths(rows, 20)
    assert narrow is not None
    assert sum(narrow) + 2 * GAP <= 20
    assert narrow[0] == 4
    assert column_widths(rows, 8) is None


def test_rows_that_do_not_fit_become_paragraphs() -> None:
    from rich.console import Console

    console = Console(width=40, record=True, file=io.StringIO())
    console.print(Fitted("sites", ("site", "kind"), [("encoder.layer.*.attention.self.query", "Linear")]))
    assert [line.rstrip() for line in console.export_text().splitlines()] == [
        "sites", "encoder.layer.*.attention.self.query", "    kind Linear", "",
    ]  # fmt: skip


# one method


def test_a_method_in_full() -> None:
    ran = run("methods", "lora", "--json")
    document = ran.json
    assert document == described("lora")
    assert document["equation"].startswith("W' = W + (alpha / r) B A")
    assert document["sits on"] == "linear layers, convolutions, embeddings, fused experts"
    assert document["when folded"] == "nothing is left"
    options = {row["option"]: row for row in document["options"]}
    assert (options["r"]["takes"], options["r"]["default"]) == ("int, > 0", "8")
    assert options["alpha"]["also written"] == "lora_alpha"
    text = run("methods", "lora").out
    assert all(name in text for name in options)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_can_be_described(name: str) -> None:
    document = described(name)
    assert document["sits on"]
    (row,) = (row for row in method_rows() if row["method"] == name)
    assert (", ".join(option["option"] for option in document["options"]) or "none") == row["options"]
    assert all(row["takes"] != "a value" for row in document["options"])


def test_a_method_that_is_misspelt() -> None:
    ran = run("methods", "lorra")
    assert ran.code == 2
    assert "adaptc methods: unknown method 'lorra'; did you mean 'lora'?" in ran.err


# plugins


def test_a_file_that_the_spec_names_brings_a_method(folder: Path) -> None:
    ran = run("plan", "spec.yaml", "--json")
    assert ran.code == 0, ran.err
    assert [(e["method"], [s["module"] for s in e["sites"]]) for e in ran.json["entries"]] == [
        ("own-gain", ["0"])
    ]
    assert any("leaves out the output head 2; name it to adapt it too" in note for note in ran.json["notes"])


def test_a_file_that_a_command_names_brings_a_method(folder: Path) -> None:
    assert run("methods", "own-gain").code == 2
    ran = run("methods", "own-gain", "--plugin", "./own_gain.py", "--json")
    assert ran.json["equation"] == "W' = diag(g) W    g (out, 1)"


@pytest.mark.parametrize(
    ("plugin", "message", "advice"),
    [
        ("./missing.py", "missing.py: no such file", "a relative path starts at the spec's folder"),
        (
            "own_gane",
            "there is no module 'own_gane'",
            "install it; a file is named by its path, such as ./own_gane.py",
        ),
        ("./broken.py", "broken.py cannot be loaded: ZeroDivisionError", "broken.py:2    1 / 0"),
        ("./wrong.py", "method's name is lower case with hyphens, got 'Wrong'", "wrong.py:7"),
    ],
)
def test_a_plugin_that_cannot_be_loaded(folder: Path, plugin: str, message: str, advice: str) -> None:
    (folder / "broken.py").write_text("import sys\n1 / 0\n")
    (folder / "wrong.py").write_text(METHOD.replace("own-gain", "Wrong"))
    ran = run("plan", "spec.yaml", "--set", f"plugins=[{plugin}]")
    assert ran.code == 2
    assert "plugins.0: " in ran.err
    assert message in ran.err
    assert advice in ran.err
    assert "Traceback" not in ran.err


def test_a_module_of_the_spec_that_is_a_file_beside_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in (str(folder), "")])
    ran = run("plan", "spec.yaml", "--set", "plugins=[own_gain]")
    assert "own_gain.py is a file: write ./own_gain.py" in ran.err


# verbosity


def test_print_after_a_pass_that_is_misspelt(folder: Path) -> None:
    ran = run(
        "compile", "spec.yaml", "--print-after", "insert-lorra", "--set", "emit=[{format: peft, path: a}]"
    )
    assert ran.code == 2
    assert "--print-after: unknown pass 'insert-lorra'; did you mean 'insert-lora'?" in ran.err


def test_verbosity() -> None:
    for verbose, quiet, level in (
        (0, False, logging.WARNING), (1, False, logging.INFO), (3, False, logging.DEBUG), (2, True, logging.ERROR),
    ):  # fmt: skip
        set_verbosity(verbose, quiet)
        assert LOGGER.level == level
    assert sum(type(handler).__name__ == "StandardError" for handler in LOGGER.handlers) == 1


def test_steps_are_logged_and_quiet_is_silent(folder: Path) -> None:
    words = ["compile", "spec.yaml", "--set", "emit=[{format: peft, path: a}]"]
    quiet = run(*words, "-q")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")
    loud = run("-v", *words, "--output-dir", "other")
    assert re.search(r"adaptc.compiler.base: tracing the model: \d+\.\d\d s", loud.err)
    assert "insert-own-gain" not in loud.err, "each pass is -vv"


# init


def test_a_first_spec_of_a_function(folder: Path) -> None:
    ran = run("init", "command_line_model:build", "--input", "input: float32[batch, 16]", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["path"] is None
    (folder / "first.yaml").write_text(ran.json["spec"])
    assert run("plan", "first.yaml", "--set", "adapt.0.r=2").code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["command_line_model:build"],
            "needs its inputs\n  name what forward takes, such as --input 'x: float32[batch, 16]'",
        ),
        (["command_line_model:biuld", "--input", "x: float32[batch, 16]"], "has no attribute 'biuld'"),
        (
            ["command_line_model:build", "--input", "x: float32[batch, 15]"],
            "but the inputs are (x): missing a required argument",
        ),
        (["command_line_model:build", "--adapter", "a"], "an adapter is read for a Hugging Face model"),
        ([".", "--input", "x: float32[batch, 16]"], "the inputs of a Hugging Face model are derived"),
        (
            ["no-such/model-here"],
            "no config.json there; expected a Hugging Face model directory\n  nor is it an id on the hub",
        ),
        (["./no-such-model"], "no config.json there; expected a Hugging Face model directory"),
    ],
)
def test_what_init_refuses(folder: Path, words: list[str], message: str) -> None:
    ran = run("init", *words)
    assert ran.code == 2, ran.err
    assert message in ran.err
    assert ran.out == ""


def test_a_first_spec_that_plan_would_refuse(folder: Path) -> None:
    """The layers of this model are too small for the rank that a first spec has."""
    (folder / "small_model.py").write_text(
        "from torch import nn\n\ndef build():\n    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))\n"
    )
    ran = run("init", "small_model:build", "--input", "input: float32[batch, 4]")
    assert ran.code == 2
    assert "rank r must be at most 4 here, got 8" in ran.err
    assert "leave the layer out: exclude: [0]" in ran.err
    assert "or give it a rank of its own: rank_pattern: {0: 4}" in ran.err
