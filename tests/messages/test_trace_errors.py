"""A model that cannot be traced is told at its author's own line: what was expected there and what to do."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import adaptc
from adaptc.errors import TraceError
from tests.hugging_face import MODELS

SOURCE = """\
import numpy
import torch
from torch import nn


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x):
        y = self.layer(x)
        if x.sum() > 0:  # Branch
            return y
        return -y


class Choice(Branch):
    def forward(self, x):
        return self.layer(x) if x.mean() > 0 else x  # Choice


class Loop(Branch):
    def forward(self, x):
        y = self.layer(x)
        for _ in range(int(x.max())):  # Loop
            y = self.layer(y)
        return y


class Until(Branch):
    def forward(self, x):
        y = self.layer(x)
        while y.norm() > 1:  # Until
            y = self.layer(y)
        return y


class Cut(Branch):
    def forward(self, x):
        y = self.layer(x)
        size = x.abs().sum().item()
        return y[:, : int(size)]  # Cut


class Listed(Branch):
    def forward(self, x):
        sizes = x[0, :2].long().tolist()
        return sum(self.layer(x) for _ in range(sizes[0]))  # Listed


class Number(Branch):
    def forward(self, x):
        return self.layer(x) * float(x.max())  # Number


class Numpy(Branch):
    def forward(self, x):
        return self.layer(x) + torch.from_numpy(numpy.tanh(x.detach().numpy()))  # Numpy


class Checked(Branch):
    def forward(self, x):
        y = self.layer(x)
        assert not y.isnan().any(), "not a number"  # Checked
        return y


class Misfit(Branch):
    def forward(self, x):
        return self.layer(x) + torch.zeros(5)  # Misfit


class Long(Branch):
    def forward(self, x):
        if x.shape[0] > 4:  # Long
            return self.layer(x)
        return -self.layer(x)


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Branch()

    def forward(self, x):
        return self.inner(x)


class Capped(Branch):
    def __init__(self):
        super().__init__()
        self.positions = nn.Parameter(torch.randn(30, 16))

    def forward(self, x):
        return self.layer(x + self.positions[: x.shape[0]])
"""
TORCH = ("use torch.where there",)
CASES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "Branch": ("Branch", "a branch depends on the values of a tensor", TORCH),
    "Choice": ("Choice", "a branch depends on the values of a tensor", TORCH),
    "Outer": ("Branch", "a branch depends on the values of a tensor", TORCH),
    "Loop": ("Loop", "the number of iterations of a loop depends on", ("a loop over shapes", "torch.where")),
    "Until": (
        "Until",
        "the number of iterations of a loop depends on",
        ("a loop over shapes", "torch.where"),
    ),
    "Cut": ("Cut", "a size depends on the values of a tensor", ("sizes that follow from the shapes", "mask")),
    "Listed": (
        "Listed",
        "the number of iterations of a loop depends on",
        ("a loop over shapes", "torch.where"),
    ),
    "Number": (
        "Number",
        "a number is taken out of a tensor",
        ("values that stay tensors", "leave out float()"),
    ),
    "Numpy": (
        "Numpy",
        "a tensor leaves torch for numpy",
        ("operations of torch only", "hand it in as an input"),
    ),
    "Checked": ("Checked", "an assertion depends on", ("the same operations", "check it before")),
    "Misfit": ("Misfit", "The size of tensor a (16) must match", ("x of shape [3, 16]",)),
    "Long": (
        "Long",
        "takes another branch at batch=6 than at batch=3, where `batch <= 4`",
        ("x: float32[3, 16]",),
    ),
}
"""A model -> the comment at the end of its line, what the first line says, and what the others hold."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The file of a user's own models."""
    folder = tmp_path_factory.mktemp("untraceable")
    file = folder / "untraceable_models.py"
    file.write_text(SOURCE)
    sys.path.insert(0, str(folder))
    yield file
    sys.path.remove(str(folder))


def check(text: str, source: Path, name: str) -> None:
    mark, first, others = CASES[name]
    lines = source.read_text().splitlines()
    number = next(i for i, line in enumerate(lines, 1) if line.endswith(f"# {mark}"))
    assert f"{name} could not be traced: " in text
    assert first in text.splitlines()[0]
    assert f"\n  at {source}:{number}    {lines[number - 1].strip()}" in text
    for words in others:
        assert words in text
    assert "\n  expected " in text or name == "Misfit"
    assert "def forward(self" not in text, "torch's own graph is printed"


@pytest.mark.parametrize("name", CASES)
def test_in_python(source: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    model = getattr(importlib.import_module("untraceable_models"), name)()
    with pytest.raises(TraceError) as caught:
        adaptc.compile(
            {"adapt": [{"method": "lora", "target": "*layer", "r": 2}]},
            model=model,
            example_inputs=(torch.randn(3, 16),),
            dynamic={"x": {0: "batch"}},
        )
    check(str(caught.value), source, name)
    assert capfd.readouterr() == ("", ""), "torch speaks too"


@pytest.mark.parametrize("command", ["plan", "compile"])
@pytest.mark.parametrize("name", CASES)
def test_on_the_command_line(
    cli: Callable[..., Any], write: Callable[[str], Path], source: Path, name: str, command: str
) -> None:
    spec = write(
        f'base: {{python: "untraceable_models:{name}"}}\ninputs: {{x: "float32[batch, 16]"}}\n'
        'adapt: [{method: lora, target: "*layer", r: 2}]\nemit: [{format: peft, path: out}]\n'
    )
    result = cli(command, spec)
    assert result.code == 1, result.err
    assert result.out == ""
    assert "Traceback" not in result.err
    assert not (spec.parent / "out").exists()
    check(result.err, source, name)


def test_a_size_that_the_model_itself_refuses_is_no_branch(source: Path) -> None:
    model = importlib.import_module("untraceable_models").Capped()
    compiled = adaptc.compile(
        {"adapt": [{"method": "lora", "target": "layer", "r": 2}]},
        model=model,
        example_inputs=(torch.randn(3, 16),),
        dynamic={"x": {0: "batch"}},
    )
    x = torch.randn(30, 16)
    assert torch.allclose(compiled.module.eval()(x), model(x))


CUSTOM = """\
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


class OwnConfig(PretrainedConfig):
    model_type = "own"


class OwnLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(8, 8)

    def forward(self, hidden):
        if hidden.abs().max() > 3:  # the data decides
            hidden = hidden.clamp(-3, 3)
        return self.dense(hidden)


class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(20, 8)
        self.layer = OwnLayer()
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        return self.layer(self.embed(input_ids) * attention_mask[..., None])
"""


def test_the_line_of_a_hugging_face_models_own_module(
    cli: Callable[..., Any], write: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "cache"), *sys.path])
    directory = tmp_path / "own"
    directory.mkdir()
    (directory / "own.py").write_text(CUSTOM)
    auto = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}
    (directory / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto}))
    spec = write(
        "base: {model: ./own, trust_remote_code: true}\nadapt: [{method: lora, target: '*.dense', r: 2}]\n"
    )
    result = cli("plan", spec)
    assert result.code == 1, result.err
    number = next(i for i, line in enumerate(CUSTOM.splitlines(), 1) if "the data decides" in line)
    assert "OwnModel could not be traced: a branch depends on the values of a tensor" in result.err
    assert f"own.py:{number}    if hidden.abs().max() > 3:" in result.err
    assert "use torch.where there" in result.err


@pytest.mark.slow
def test_the_line_of_transformers_itself(
    cli: Callable[..., Any], write: Callable[[str], Path], tmp_path: Path
) -> None:
    """BART in float16 looks for infinite values, and clamps them."""
    model = MODELS["bart"].build()
    model.config.architectures = ["BartForConditionalGeneration"]  # type: ignore[union-attr]
    model.config.save_pretrained(tmp_path / "bart")  # type: ignore[operator, union-attr]
    spec = write(
        "base: {model: ./bart, task: seq2seq-lm, dtype: float16}\nadapt: [{method: lora, target: '*.fc1', r: 2}]\n"
    )
    result = cli("plan", spec)
    assert result.code == 1, result.err
    assert "modeling_bart.py:" in result.err
    assert "torch.isfinite" in result.err
    assert "another base.dtype may avoid it" in result.err
    assert cli("plan", spec, "--set", "base.dtype=bfloat16").code == 0


class Heard(nn.Module):
    """A convolution with a window longer than what is tried."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 4, 400)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).mean(-1)


def test_an_input_that_is_too_short_for_a_convolution() -> None:
    spec = {"inputs": {"x": "float32[batch, 1, time]"}, "adapt": []}
    with pytest.raises(adaptc.AdaptcError) as caught:
        adaptc.compile(spec, model=Heard())
    text = str(caught.value)
    assert "Heard could not be traced: an input is too short for a convolution" in text
    assert "return self.conv(x).mean(-1)" in text
    assert "write its size as a number in `inputs`" in text


class Bessel(nn.Module):
    """An operation that ONNX has no form for."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(self.up(x))


class Inside(nn.Module):
    """A model of transformers inside of a module of one's own, which decides on its cache."""

    def __init__(self) -> None:
        super().__init__()
        self.model = MODELS["llama"].build()

    def forward(self, input_ids: torch.Tensor) -> Any:
        return self.model(input_ids)


def test_a_model_that_gives_back_its_cache() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    ids = torch.zeros(2, 5, dtype=torch.long)
    with pytest.raises(TraceError, match=r"returns a cache of keys and values(.|\n)*use_cache = False"):
        adaptc.compile({}, model=Inside(), example_inputs={"input_ids": ids})


def test_what_onnx_has_no_form_for_is_told_with_its_line(tmp_path: Path) -> None:
    compiled = adaptc.compile({"inputs": {"x": "float32[batch, 4]"}, "adapt": []}, model=Bessel())
    with pytest.raises(adaptc.AdaptcError) as caught:
        compiled.emit("onnx", tmp_path / "m.onnx")
    text = str(caught.value)
    assert "ONNX export failed" in text
    assert "bessel_j0" in text
    assert re.search(r"\n  (in .*, )?from test_trace_errors\.py:\d+", text)
    assert "artifacts in other formats (torch, hf) need none" in text
    assert not list(tmp_path.iterdir())
