"""Inputs and outputs as authors write them: their names, nested containers, constants, and classes of their own."""

from __future__ import annotations

import collections
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import onnxruntime
import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import adaptc
from adaptc.errors import InputError, TraceError


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l, self.o = nn.Linear(4, 4), nn.Linear(4, 2)


class Capital(Base):
    def forward(self, X: torch.Tensor) -> torch.Tensor:
        return self.l(X)


class Builtin(Base):
    def forward(self, input: torch.Tensor, Mask: torch.Tensor) -> torch.Tensor:
        return self.l(input) * Mask


class Clashing(Base):
    def forward(self, torch: Any, print: Any, self_: Any, weight: Any) -> Any:
        return self.l(torch + self_) * print + weight


class Keyword(Base):
    def forward(self, x: torch.Tensor, *, scale: torch.Tensor, flag: bool = True) -> torch.Tensor:
        return self.l(x) * scale if flag else x


class Starred(Base):
    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        return self.l(args[0]) + sum(kwargs.values())


class Positional(Base):
    def forward(self, x: torch.Tensor, /, mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.l(x) if mask is None else self.l(x) * mask


class Nested(Base):
    def forward(self, batch: dict[str, Any], mask: torch.Tensor | None = None) -> dict[str, Any]:
        y = self.l(batch["x"]) + batch["more"][0]
        return {"logits": self.o(y if mask is None else y * mask), "states": (y, [y + 1])}


@dataclass
class Given:
    x: torch.Tensor
    mode: str = "plain"


@dataclass
class Result:
    logits: torch.Tensor
    hidden: torch.Tensor | None = None
    inner: Any = None


@dataclass(init=False, frozen=True)
class Made:
    logits: torch.Tensor

    def __init__(self, result: torch.Tensor) -> None:
        object.__setattr__(self, "logits", result)


class Pair(NamedTuple):
    logits: torch.Tensor
    hidden: torch.Tensor


class Record(dict[str, Any]):
    pass


class Plain:
    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits


class Dataclasses(Base):
    def forward(self, given: Given) -> Result:
        h = self.l(given.x)
        return Result(self.o(h), None, Result(h, h + 1))


class Returning(Base):
    def __init__(self, make: Callable[..., Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: torch.Tensor) -> Any:
        h = self.l(x)
        return self.make(self.o(h), h)


X, Y = torch.randn(3, 4), torch.randn(3, 4)
B = {0: "batch"}
CASES: dict[str, tuple[Callable[[], nn.Module], Any, Any, list[str], list[str]]] = {
    "capital": (Capital, (X,), {"X": B}, ["X"], ["output"]),
    "builtin": (Builtin, (X, Y), {"input": B, "Mask": B}, ["input", "Mask"], ["output"]),
    "clashing": (
        Clashing,
        (X, Y, X, Y),
        {"torch": B, "print": B, "self_": B, "weight": B},
        ["torch_", "print", "self_", "weight"],
        ["output"],
    ),
    "keyword": (Keyword, {"x": X, "scale": Y}, {"x": B, "scale": B}, ["x", "scale"], ["output"]),
    "keywords": (Starred, {"lambda": X, "w": Y}, {"lambda": B, "w": B}, ["lambda_", "w"], ["output"]),
    "positional": (Positional, (X,), {"x": B}, ["x"], ["output"]),
    "none": (Positional, (X, None), {"x": B}, ["x"], ["output"]),
    "nested": (
        Nested,
        ({"x": X, "more": [Y]},),
        {"batch": {"x": B, "more": [B]}},
        ["batch_x", "batch_more_0"],
        ["logits", "states.0", "states.1.0"],
    ),
    "flat names": (
        Nested,
        {"batch": {"x": X, "more": (Y,)}, "mask": Y},
        {"batch_x": B, "batch_more_0": B, "mask": B},
        ["batch_x", "batch_more_0", "mask"],
        ["logits", "states.0", "states.1.0"],
    ),
    "dataclass": (
        Dataclasses,
        (Given(X),),
        {"given": {"x": B}},
        ["given_x"],
        ["logits", "inner.logits", "inner.hidden"],
    ),
    "constructor": (lambda: Returning(lambda y, h: Made(y)), (X,), {"x": B}, ["x"], ["logits"]),
    "named tuple": (lambda: Returning(Pair), (X,), {"x": B}, ["x"], ["logits", "hidden"]),
    "dict": (lambda: Returning(lambda y, h: Record(a=y, b=h)), (X,), {"x": B}, ["x"], ["a", "b"]),
    "ordered": (
        lambda: Returning(lambda y, h: collections.OrderedDict(a=y, b=[h])),
        (X,),
        {"x": B},
        ["x"],
        ["a", "b.0"],
    ),
}


def call(module: nn.Module, examples: Any) -> Any:
    return module(**examples) if isinstance(examples, dict) else module(*examples)


def tensors(result: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("case", CASES)
def test_inputs_and_outputs_are_the_authors(case: str, tmp_path: Path) -> None:
    make, examples, dynamic, inputs, outputs = CASES[case]
    if case == "keywords":
        model: nn.Module = type("Keywords", (Base,), {"forward": lambda s, **k: s.l(k["lambda"]) + k["w"]})()
    else:
        model = make()
    model.eval()
    adapt = [{"method": "lora", "target": "l", "r": 2}]
    compiled = adaptc.compile({"adapt": adapt}, model=model, example_inputs=examples, dynamic=dynamic)
    assert [spec.name for spec in compiled.graph.inputs] == inputs
    with torch.no_grad():
        expected = call(model, examples)
        got = call(compiled.module.eval(), examples)
    assert type(got) is type(expected)
    for ours, theirs in zip(tensors(got), tensors(expected), strict=True):
        torch.testing.assert_close(ours, theirs)

    compiled.emit("onnx", tmp_path / "program.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "program.onnx"))
    assert [value.name for value in session.get_inputs()] == inputs
    assert [value.name for value in session.get_outputs()] == outputs
    given = list(examples.values()) if isinstance(examples, dict) else examples
    leaves = [X] if case == "dataclass" else tensors(given)
    results = session.run(None, {name: leaf.numpy() for name, leaf in zip(inputs, leaves, strict=True)})
    for ours, theirs in zip(results, tensors(expected), strict=True):
        torch.testing.assert_close(torch.as_tensor(ours), theirs)

    compiled.emit("torch", tmp_path / "program")
    loaded = adaptc.load(tmp_path / "program").eval()
    with torch.no_grad():
        again = loaded(**dict(zip(inputs, leaves, strict=True)))
    for ours, theirs in zip(tensors(again), tensors(expected), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_constant_is_told_and_another_value_refused() -> None:
    model = type("Scaled", (Base,), {"forward": lambda s, x, scale=1.0: s.l(x) * scale})().eval()
    compiled = adaptc.compile(
        {"adapt": [{"method": "lora", "target": "l", "r": 2}]},
        model=model,
        example_inputs=(X, 2.0),
        dynamic={"x": B},
    )
    assert [note for note in compiled.plan.notes if "scale of Scaled.forward is 2.0 in every product" in note]
    torch.testing.assert_close(compiled.module.eval()(X, 2.0), model(X, 2.0))
    with pytest.raises(InputError, match=r"scale of Scaled.forward is 2.0 in the trace, got 3.0"):
        compiled.module(X, 3.0)


def test_a_class_that_torch_cannot_make_is_named() -> None:
    with pytest.raises(TraceError, match=r"Plain holds tensors") as error:
        adaptc.trace(Returning(lambda y, h: Plain(y)), (X,))
    assert "make Plain a dataclass" in str(error.value)
    assert "functorch" not in str(error.value)


@pytest.mark.parametrize(
    ("dynamic", "message"),
    [
        ({"batch": {"z": B}}, "dynamic names batch.z, but the inputs are batch_x, batch_more_0"),
        ({"batch_x": {5: "d"}}, "dynamic names dimension 5 of 'batch_x', which has 2"),
    ],
)
def test_dynamic_names_an_input_and_an_axis(dynamic: Any, message: str) -> None:
    with pytest.raises(TraceError) as error:
        adaptc.trace(Nested(), ({"x": X, "more": [Y]},), dynamic)
    assert message in str(error.value)


class Framed(nn.Module):
    """A convolutional front end: 16 samples are the least it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.l = nn.Conv1d(1, 4, 10, 5), nn.Conv1d(4, 4, 3, 2), nn.Linear(4, 2)

    def forward(self, audio: torch.Tensor) -> torch.Tensor:
        return self.l(self.b(self.a(audio[:, None]).relu()).transpose(1, 2))


@pytest.mark.parametrize("samples", [40, 1600])
def test_a_trace_is_at_the_sizes_of_the_examples(samples: int, tmp_path: Path) -> None:
    model = Framed().eval()
    compiled = adaptc.compile(
        {"adapt": [{"method": "lora", "target": "l", "r": 2}]},
        model=model,
        example_inputs=(torch.randn(1, samples),),
        dynamic={"audio": {0: "batch", 1: "samples"}},
    )
    compiled.emit("onnx", tmp_path / "program.onnx")
    compiled.emit("torch", tmp_path / "program")
    audio = torch.randn(3, 4321)
    session = onnxruntime.InferenceSession(str(tmp_path / "program.onnx"))
    (got,) = session.run(None, {"audio": audio.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.as_tensor(got), model(audio))
        torch.testing.assert_close(adaptc.load(tmp_path / "program").eval()(audio), model(audio))
