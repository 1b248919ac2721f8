"""Products side by side: every size is timed, ratios are to what is named, and labels that are right are counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import adaptc
from adaptc.products import bench as module
from adaptc.products.accuracy import interval
from adaptc.products.memory import growth_of
from tests.command_line import run
from tests.reviews import shares
from tests.served import Served

TEXTS = ("a good film .", "a very bad film .", "warm , very warm", "dull")
NAMES = ["base.onnx", "folded.onnx", "trainable"]


@pytest.fixture(autouse=True)
def _no_processes(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Memory is measured in processes of their own, which take seconds to start."""
    if "slow" not in request.keywords:
        monkeypatch.setattr(module, "growth_of", lambda path, name, sizes: 1000)


@pytest.fixture
def rows(reviewer: Path, tmp_path: Path) -> Path:
    """Rows with the labels that the base itself gives, and one that it does not."""
    path = tmp_path / "rows.jsonl"
    names = [max(each, key=lambda label: each[label]) for each in (shares(reviewer, text) for text in TEXTS)]
    lines = [{"text": text, "label": name} for text, name in zip(TEXTS, names, strict=True)]
    wrong = next(name for name in ("bad", "good") if name != names[0])
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"text": TEXTS[0], "label": wrong}]))
    return path


@pytest.mark.slow
def test_side_by_side(build: Path, rows: Path) -> None:
    result = adaptc.bench(build, rows=rows, batches=(1, 2), lengths=(4, 8), seconds=0.01)
    assert result.against == "base.onnx"
    assert [(t.product, t.batch, t.length) for t in result.timings] == [
        (name, batch, length) for batch in (1, 2) for length in (4, 8) for name in NAMES
    ]
    for timing in result.timings:
        assert timing.median is not None
        assert timing.p95 is not None
        assert timing.ratio is not None
        assert 0 < timing.median <= timing.p95
        assert timing.calls >= 5
        assert (timing.product != "base.onnx") or timing.ratio == 1.0
    assert list(result.bytes) == NAMES
    assert result.bytes["folded.onnx"] == (build / "folded.onnx").stat().st_size
    assert [(a.product, a.right, a.rows) for a in result.accuracies] == [(name, 4, 5) for name in NAMES]
    assert json.loads(json.dumps(result.to_json()))["accuracies"][0]["right"] == 4


@pytest.mark.slow
def test_against_the_base_in_transformers_and_against_a_file(build: Path, rows: Path) -> None:
    sizes: dict[str, Any] = {"batches": (1,), "lengths": (4,), "seconds": 0.01}
    against = adaptc.bench(build / "folded.onnx", rows=rows, against="base", **sizes)
    assert against.against == "base in transformers"
    assert [t.product for t in against.timings] == ["folded.onnx", "base in transformers"]
    assert [(a.right, a.rows) for a in against.accuracies] == [(4, 5), (4, 5)]
    other = adaptc.bench(build / "folded.onnx", against=build / "base.onnx", **sizes)
    assert other.against == str(build / "base.onnx")


def test_a_size_that_does_not_run_is_told(build: Path) -> None:
    """The model has 24 positions."""
    words = ("bench", build / "folded.onnx", "--batch", 1, "--length", 4, "--length", 40, "--seconds", 0.01)
    document = run(*words, "--json").json
    runs, fails = document["timings"]
    assert runs["problem"] == ""
    assert fails["problem"]
    assert fails["median"] is None
    shown = run(*words).out
    assert "does not run:" in shown
    assert "ratio to folded.onnx, whose calls took turns with the others" in shown
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"text": "dull", "label": "fine"}, "rows.jsonl:1: the label 'fine' is none of bad, good, neither"),
        ({"text": "dull"}, "rows.jsonl:1: a text needs one label: its number, or one of bad, good, neither"),
        (
            {"input_ids": [2, 3]},
            "rows.jsonl:1: no labels; a row has text and label, or the inputs and labels",
        ),
        ({"input_ids": [2, 3], "labels": 1}, "rows.jsonl:1: attention_mask, token_type_ids missing"),
        (
            {"input_ids": [2], "token_type_ids": [0], "attention_mask": [1], "labels": -100},
            "there is no row with a label",
        ),
        ([1], "rows.jsonl:1: expected an object such as"),
    ],
)
def test_rows_that_do_not_fit(build: Path, tmp_path: Path, line: object, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(adaptc.AdaptcError) as error:
        adaptc.bench(build / "folded.onnx", rows=path, batches=(1,), lengths=(4,), seconds=0.001)
    assert message in str(error.value)


def test_numbers_out_of_range(build: Path) -> None:
    ran = run("bench", build, "--batch", 0, "--rows", "nowhere.jsonl")
    assert ran.code == 2
    assert "--batch: expected numbers above 0, got 0" in ran.err
    ran = run("bench", build / "folded.onnx", "--rows", "nowhere.jsonl", "--seconds", 0.001)
    assert "--rows: nowhere.jsonl: no such file; expected .jsonl, a row a line" in ran.err


def test_the_interval_of_an_accuracy() -> None:
    """Wilson's, from the formula in Brown, Cai and DasGupta 2001, equation 4: 0.8 of 100."""
    low, high = interval(80, 100)
    assert (low, high) == pytest.approx((0.7111, 0.8666), abs=1e-4)
    assert interval(0, 10)[0] == 0.0
    assert interval(10, 10)[1] == pytest.approx(1.0)


@pytest.mark.slow
def test_memory_grows_by_what_is_loaded(build: Path) -> None:
    assert growth_of(build, "folded.onnx", {"batch": 1, "seq": 8}) < 500e6


@pytest.mark.slow
def test_tokens_a_second(served: Served) -> None:
    result = adaptc.bench(served.program)
    (decoding,) = result.decodings
    assert decoding.first > 0
    assert decoding.tokens > 0
    assert not result.timings
