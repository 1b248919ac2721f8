"""What torch's exporter alone exports right, adaptc exports right; the rest it refuses in words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.operation_cases import cases, operation_names
from benchmarks.operations import judged, once_each, prepared, with_adaptc
from benchmarks.outcomes import EXCEPTIONS

PARTS = 24
"""The operations are run in as many tests."""
QUICK = ("topk", "amax", "quantile", "linalg.solve", "nn.functional.interpolate.bicubic")
"""Operations of several outputs, without one of its arguments, of a dynamic number of values, with a form of adaptc's
own, and whose decomposition computes with sizes."""


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Export a module once here, so that no process of a case imports everything again."""
    module, _ = prepared(next(cases(["sin"])), "fixed")
    assert module is not None
    with_adaptc(module, tmp_path_factory.mktemp("warm"))


@pytest.mark.parametrize("name", QUICK)
def test_some_operations_are_exported_for_any_size(name: str, tmp_path: Path) -> None:
    module, _ = prepared(next(cases([name])), "dynamic")
    assert module is not None
    assert with_adaptc(module, tmp_path) == "right"
    assert module.dynamic


def test_a_program_that_gives_something_else_is_wrong(tmp_path: Path) -> None:
    module, _ = prepared(next(cases(["sin"])), "fixed")
    assert module is not None
    assert with_adaptc(module, tmp_path) == "right"
    other = replace(module, expected=[1.01 * value for value in module.expected])
    assert judged(other, tmp_path / "adaptc.onnx") == "wrong: by 1e-02"


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_every_operation_is_right_or_refused_where_the_exporter_is_no_better(part: int, warm: None) -> None:
    """One call of each; `make operations` runs the other calls, fixed sizes and core operations too."""
    names = operation_names()[part::PARTS]
    results = list(once_each(names))
    assert len(results) > len(names) / 2
    assert not [result for result in results if not result.holds]
    stale = [result.key for result in results if result.adaptc == "right" and result.key in EXCEPTIONS]
    assert not stale, "these are right now: take them out of EXCEPTIONS"
