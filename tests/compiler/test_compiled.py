"""What a person holds after a compile: its text, what emit returns, and modules in another dtype."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import adaptc
from adaptc.progress import bars
from adaptc.progress.steps import BYTES, Step, begin, each, step, watched


class Net(nn.Module):
    """A layer, and another behind it, between them a constant of float32 if `wide`."""

    def __init__(self, wide: bool) -> None:
        super().__init__()
        self.query, self.value, self.wide = nn.Linear(8, 6), nn.Linear(6, 4), wide

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.query(x)
        h = h * torch.ones(6) if self.wide else h
        return self.value(torch.tanh(h))


def made(wide: bool = False) -> adaptc.Compiled:
    spec = {"adapt": [{"method": "lora", "target": "query", "r": 2}]}
    return adaptc.compile(
        spec, model=Net(wide), example_inputs=(torch.randn(3, 8),), dynamic={"x": {0: "batch"}}
    )


@pytest.fixture(scope="module")
def compiled() -> adaptc.Compiled:
    return made()


def test_its_text_is_short(compiled: adaptc.Compiled) -> None:
    text = repr(compiled)
    assert text.endswith(".Net: lora 'default'; 28 of 82 parameters train>")
    assert len(text) < 120


def test_emit_gives_what_was_written(compiled: adaptc.Compiled, tmp_path: Path) -> None:
    written = compiled.emit("peft", tmp_path / "adapter")
    assert written.path == tmp_path / "adapter"
    assert (written.path / "adapter_config.json").is_file()
    assert written.errors is None


def test_a_module_runs_in_the_dtype_that_it_is_converted_to(compiled: adaptc.Compiled) -> None:
    x = torch.randn(5, 8)
    module = copy.deepcopy(compiled.module).eval()
    expected = module(x)
    for convert in (
        lambda m: m.to(torch.bfloat16),
        lambda m: m.bfloat16(),
        lambda m: m.to("cpu", torch.float16),
    ):
        narrow: Any = convert(copy.deepcopy(module))
        got = narrow(x.to(next(narrow.parameters()).dtype))
        assert got.dtype == next(narrow.parameters()).dtype
        assert (got.float() - expected).abs().max() < 0.05
    assert compiled.fold().to(torch.float64)(x.double()).dtype == torch.float64


def test_a_module_that_cannot_be_converted_says_what_to_do() -> None:
    compiled = made(wide=True)
    module = compiled.module
    before = {name: tensor.dtype for name, tensor in module.state_dict().items()}
    with pytest.raises(adaptc.AdaptcError) as error:
        module.to(torch.bfloat16)
    text = str(error.value)
    assert "was traced in float32 and does not run in bfloat16: " in text
    assert "adaptc.compile(spec, overrides=['base.dtype=bfloat16'])" in text
    assert "run it under torch.autocast" in text
    assert {name: tensor.dtype for name, tensor in module.state_dict().items()} == before
    module.to("cpu").to(torch.float32)
    with pytest.raises(adaptc.AdaptcError, match="does not run in float16"):
        nn.Sequential(compiled.fold()).half()


def test_an_artifact_that_was_loaded_says_so_too(tmp_path: Path) -> None:
    compiled = made(wide=True)
    compiled.emit("torch", tmp_path / "trainable")
    with pytest.raises(adaptc.AdaptcError, match="does not run in bfloat16"):
        adaptc.load(tmp_path / "trainable").to(torch.bfloat16)


# progress


class Watching:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def begin(self, step: Step) -> None:
        self.told.append(f"begin {step.name}")

    def advance(self, step: Step) -> None:
        self.told.append(bars.amount(step))

    def end(self, step: Step) -> None:
        self.told.append(f"end {step.name}")


def test_steps_are_told_to_whoever_watches(caplog: pytest.LogCaptureFixture) -> None:
    import logging

    log = logging.getLogger("adaptc.test")
    watching = Watching()
    with caplog.at_level("INFO", "adaptc"), watched(watching), step(log, "outer"):
        assert list(each(log, "inner", [5, 6], "rows")) == [5, 6]
        writing = begin(log, "writing", 4_000_000, BYTES)
        writing.at(1_500_000)
        writing.end()
    assert watching.told == [
        "begin outer", "begin inner", "1 of 2 rows", "2 of 2 rows", "end inner",
        "begin writing", "1.5 MB of 4.0 MB", "end writing", "end outer",
    ]  # fmt: skip
    assert [record.message.partition(":")[0] for record in caplog.records] == ["inner", "writing", "outer"]
    told = len(watching.told)
    with step(log, "unwatched"):
        pass
    assert len(watching.told) == told


def test_bars_show_what_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    import logging

    from rich.console import Console

    log = logging.getLogger("adaptc.test")
    monkeypatch.setattr(bars, "SHOWN_AFTER", 0.0)
    terminal = io.StringIO()
    with (
        bars.Bars(Console(file=terminal, force_terminal=True, width=80)).drawing(),
        step(log, "reading", 2, "rows") as s,
    ):
        s.advance()
        s.advance()
    assert "reading" in terminal.getvalue()
    monkeypatch.setattr(bars, "SECONDS_BETWEEN_LINES", -1.0)
    lines = io.StringIO()
    with bars.Bars(Console(file=lines, force_terminal=False)).drawing(), step(log, "reading", 2, "rows") as s:
        s.advance()
    assert lines.getvalue() == "  reading: 1 of 2 rows\n"


def test_progress_in_python(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bars, "SECONDS_BETWEEN_LINES", -1.0)
    spec = {"adapt": [{"method": "lora", "target": "query", "r": 2}]}
    inputs = {"example_inputs": (torch.randn(3, 8),), "dynamic": {"x": {0: "batch"}}}
    adaptc.compile(spec, model=Net(False), **inputs)
    assert capsys.readouterr().err == ""
    adaptc.compile(spec, model=Net(False), progress=True, **inputs)
    captured = capsys.readouterr()
    assert "running the graph: 3 of" in captured.err
    assert captured.out == ""
