"""Pages for those who carry on: the files they name are there, and every decision is in the index."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs/decisions").glob("*.md")),
    ROOT / "README.md",
]
ROOMS = {path.parent.name for path in (ROOT / "adaptc").glob("*/__init__.py")} - {"passes"}


def named_files(text: str) -> set[str]:
    """What a page names in backticks or links: `adaptc/ir/graph.py`, `spec/source.py`, `[a link](page.md)`."""
    quoted = re.findall(r"`((?:[\w-]+/)+[\w.-]*\.?\w*)`", text)
    files = {name for name in quoted if re.match(r"(adaptc|passes|tests|docs|specs|benchmarks)/", name)}
    files |= {f"adaptc/{name}" for name in quoted if name.split("/")[0] in ROOMS}
    return files


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_is_there(page: Path) -> None:
    text = page.read_text()
    assert not {name for name in named_files(text) if not (ROOT / name).exists()}
    links = {link.split("#")[0] for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text)}
    assert not {link for link in links if link and not (page.parent / link).exists()}


def test_the_page_of_the_architecture_names_every_room() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    assert not {room for room in ROOMS if f"`{room}/`" not in text}


def test_every_decision_is_in_the_index() -> None:
    index = (ROOT / "docs/decisions/README.md").read_text()
    assert not {p.name for p in (ROOT / "docs/decisions").glob("0*.md") if f"({p.name})" not in index}
