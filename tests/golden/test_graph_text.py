"""The text of a small graph after each pass, held against files: a change of it is seen in review.

Write them anew with `UPDATE_GOLDEN=1 pytest tests/golden`.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import textwrap
from pathlib import Path

import pytest

import adaptc
from adaptc.ir.graph import Graph
from adaptc.methods.site import KINDS
from adaptc.rewriter.catalog import load_passes
from adaptc.rewriter.pipeline import Pass
from tests.golden.cases import cases

HERE = Path(__file__).parent
COLUMNS, LINES = 160, 55
"""What a screen holds."""


def file_of(name: str) -> Path:
    return HERE / f"{name.replace(' ', '-')}.txt"


def shown(graph: Graph) -> str:
    """The text of a graph: with the names of dimensions in place of torch's symbols, and long lines continued."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    text = graph.text()
    for node, spec in zip(inputs, graph.inputs, strict=True):
        for size, name in zip(node.meta["val"].shape, spec.dims, strict=True):
            if isinstance(name, str):
                text = re.sub(rf"\b{size}\b", name, text)
    for name in ("past", "virtual"):  # torch sorts its symbols by their names
        text = text.replace(f"seq + {name}", f"{name} + seq")
    lines = text.splitlines()
    return "".join(textwrap.fill(line, COLUMNS, subsequent_indent="    ") + "\n" for line in lines)


def of_any_version(text: str) -> str:
    """A text in which a detached value is an alias, as newer versions of torch trace it."""
    return text.replace("detach", "alias")


@pytest.mark.parametrize("name", cases())
def test_text(name: str) -> None:
    graph, passes = cases()[name]()
    assert not passes or name.split()[0] == passes[-1].name
    text = shown(adaptc.run(graph, passes))
    if os.environ.get("UPDATE_GOLDEN"):
        file_of(name).write_text(text)
    recorded = of_any_version(file_of(name).read_text())
    assert of_any_version(text) == recorded, "run with UPDATE_GOLDEN=1 if this change is meant"
    assert len(text.splitlines()) <= LINES, "it is not read at once: choose a smaller graph"


def test_there_is_a_text_of_every_shipped_pass() -> None:
    """Those that a spec names, and those that the compiler runs by itself."""
    for module in pkgutil.walk_packages(adaptc.__path__, "adaptc."):
        importlib.import_module(module.name)
    shipped, classes = (
        {name for name in load_passes() if load_passes()[name].__module__.startswith("adaptc.")},
        [Pass],
    )
    for cls in classes:
        classes += cls.__subclasses__()
        if isinstance(cls.__dict__.get("name"), str) and cls.__module__.startswith("adaptc."):
            shipped.add(cls.name)
    assert shipped == {name.split()[0] for name in cases()} - {"traced"}


def test_there_is_a_text_of_every_kind_of_site() -> None:
    kinds = set()
    for name, case in cases().items():
        if name.startswith("insert-"):
            kinds |= {adaptation.site.kind for adaptation in adaptc.run(*case()).adaptations}
    assert kinds == set(KINDS)


def test_there_is_no_text_of_nothing() -> None:
    assert {path.name for path in HERE.glob("*.txt")} == {file_of(name).name for name in cases()}


def test_a_fold_reads_as_the_base() -> None:
    assert file_of("fold").read_text() == file_of("traced").read_text()
