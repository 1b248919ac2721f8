"""The Python of the guides in docs/ runs, block after block, as the cells of one notebook."""

from __future__ import annotations

import linecache
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adaptc.methods.method import METHODS
from adaptc.quantization.scheme import SCHEMES
from adaptc.rewriter.pipeline import PASSES

DOCS = Path(__file__).parents[2] / "docs"
GUIDES = [*sorted(DOCS.glob("writing-a-*.md")), DOCS / "adapters.md", DOCS / "heads.md"]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """The module that cells run in, `__main__` as in a notebook; whatever they register is taken out again."""
    tables: list[Any] = [METHODS, SCHEMES, PASSES]
    before = [set(table) for table in tables]
    notebook = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", notebook)
    yield notebook
    for table, names in zip(tables, before, strict=True):
        for name in set(table) - names:
            table.forget(name)


def blocks(guide: Path) -> list[tuple[str, str]]:
    """The Python blocks of a guide: the place of each, as messages name it, and its text."""
    text = guide.read_text()
    starts = [text.count("\n", 0, block.start()) + 1 for block in BLOCK.finditer(text)]
    return [(f"{guide.name}:{line}", block) for line, block in zip(starts, BLOCK.findall(text), strict=True)]


def run(place: str, text: str, module: types.ModuleType) -> None:
    """Run a block in a module; its source lines are known, as those of a notebook's cell are."""
    linecache.cache[place] = (len(text), None, text.splitlines(keepends=True), place)
    exec(compile(text, place, "exec", dont_inherit=True), vars(module))


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_a_guide_runs(guide: Path, module: types.ModuleType, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    cells = blocks(guide)
    assert len(cells) == guide.read_text().count("```python") > 0
    for place, text in cells:
        run(place, text, module)


def test_a_block_that_fails_is_an_error(module: types.ModuleType, tmp_path: Path) -> None:
    guide = tmp_path / "guide.md"
    guide.write_text(
        "One.\n\n```python\nvalue = 1\n```\n\n```yaml\nvalue: 2\n```\n\n```python\nassert value == 2\n```\n"
    )
    (first, one), (second, two) = blocks(guide)
    assert (first, second) == ("guide.md:3", "guide.md:11")
    run(first, one, module)
    with pytest.raises(AssertionError):
        run(second, two, module)


def test_there_are_guides() -> None:
    assert DOCS / "writing-a-method.md" in GUIDES
