"""What forward changes: the trainable module keeps the state as PyTorch does, and programs tell that they do not."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import adaptc
from tests.families import randomise


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l, self.o = nn.Linear(4, 4), nn.Linear(4, 2)
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("ring", torch.randn(5, 4), persistent=False)
        self.mean: torch.Tensor
        self.count: torch.Tensor
        self.ring: torch.Tensor


class Average(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean.mul_(0.9).add_(0.1 * x.mean(0))  # writes
        return self.o(self.l(x - self.mean))


class Assigned(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)  # writes
        return self.o(self.l(x - self.mean))


class Counter(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1  # writes
        return self.o(self.l(x))


class Ring(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.ring.copy_(torch.roll(self.ring, 1, 0))  # writes
        self.ring[0] = x.mean(0)
        return self.o(self.l(x + self.ring.sum(0)))


class Attribute(Base):
    def __init__(self) -> None:
        super().__init__()
        self.plain = torch.randn(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.plain.mul_(0.5).add_(x.mean(0))  # writes
        return self.o(self.l(x - self.plain))


class Bounded(Base):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4, max_norm=0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(self.l(self.table(x.abs().long().clamp(max=9)[:, 0])))  # writes


WRITING = {
    Average: "mean",
    Assigned: "mean",
    Counter: "count",
    Ring: "ring",
    Attribute: "plain",
    Bounded: "table.weight",
}
LORA = {"adapt": [{"method": "lora", "target": "l", "r": 2}]}


def made(model: nn.Module) -> adaptc.Compiled:
    return adaptc.compile(LORA, model=model, example_inputs=(torch.randn(3, 4),), dynamic={"x": {0: "batch"}})


@pytest.mark.parametrize("kind", WRITING)
def test_what_forward_writes(kind: type[Base], tmp_path: Path) -> None:
    model = randomise(kind()).eval()
    eager = copy.deepcopy(model)
    compiled = made(model)
    for ours, theirs in zip(model.state_dict().values(), eager.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)

    source = Path(__file__).read_text().splitlines()
    first = source.index(f"class {kind.__name__}(Base):")
    line = next(number for number, text in enumerate(source, 1) if number > first and "# writes" in text)
    note = f"forward changes {WRITING[kind]} (test_state.py:{line}): a program has no state"
    assert any(note in told for told in compiled.plan.notes)

    rows = [torch.randn(4, 4) for _ in range(3)]
    compiled.emit("onnx", tmp_path / "program.onnx")
    notes = json.loads((tmp_path / "manifest.json").read_text())["base"]["notes"]
    assert any(note in told for told in notes)
    session = onnxruntime.InferenceSession(str(tmp_path / "program.onnx"))
    for row in rows:  # each call starts from the compiled value
        (got,) = session.run(None, {"x": row.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.as_tensor(got), copy.deepcopy(eager)(row))

    compiled.emit("torch", tmp_path / "program")
    loaded, module = adaptc.load(tmp_path / "program").eval(), compiled.module.eval()
    with torch.no_grad():
        for row in rows:  # the state goes on from call to call
            expected = eager(row)
            torch.testing.assert_close(module(row), expected)
            torch.testing.assert_close(loaded(row), expected)
    for name, buffer in eager.named_buffers():
        torch.testing.assert_close(module.get_buffer(name), buffer)


class TrainedAverage(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.l(x)
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * h.detach().mean(0))
        return self.o(h - self.mean)


class WithoutGradients(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.l(x)
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(h.mean(0), 0.1)
                self.count += 1
        return self.o(h - self.mean)


class Reassigned(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.l(x)
        if self.training:
            self.mean = (0.9 * self.mean + 0.1 * h.mean(0)).detach()
        return self.o(h * self.mean.exp())


class Stepping(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.count.add_(2)
        return self.o(self.l(x))


class Normed(Base):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(F.relu(self.norm(self.l(x))))


@pytest.mark.parametrize("kind", [TrainedAverage, WithoutGradients, Reassigned, Stepping, Normed])
def test_what_forward_writes_in_training(kind: type[Base], tmp_path: Path) -> None:
    model = randomise(kind()).train()
    eager = copy.deepcopy(model)
    compiled = made(model)
    compiled.emit("torch", tmp_path / "program")
    module, loaded = compiled.module.train(), adaptc.load(tmp_path / "program").train()
    for mode in (True, False, True):
        for each in (eager, module, loaded):
            each.train(mode)
        for _ in range(2):
            row = torch.randn(4, 4)
            expected: Any = eager(row)
            for each in (module, loaded):
                got = each(row)
                torch.testing.assert_close(got, expected)
                if mode:
                    got.sum().backward()
        for name, buffer in eager.named_buffers():
            torch.testing.assert_close(module.get_buffer(name), buffer)
            torch.testing.assert_close(loaded.get_buffer(name), buffer)


class Python(Base):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.last: torch.Tensor | None = None
        self.history: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.last = self.l(x)
        self.history.append(self.last)
        return self.o(self.history[-1]) * self.calls


def test_attributes_that_forward_assigns_are_as_before_and_numbers_are_told() -> None:
    model = Python().eval()
    compiled = made(model)
    assert (model.calls, model.last, model.history) == (0, None, [])
    assert any("forward of Python changes the number calls" in note for note in compiled.plan.notes)
    row = torch.randn(4, 4)
    with torch.no_grad():
        torch.testing.assert_close(compiled.module.eval()(row), model(row))


class Filled(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(x.shape[0], 3, 4)
        for step in range(3):
            out[:, step] = self.l(x * step)
        return out


class Placed(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(x.shape[0], 4)
        out.index_put_((torch.arange(x.shape[0]),), self.l(x))
        return out


class Copied(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty(x.shape[0], 8)
        out[:, :4].copy_(self.l(x))
        out[:, 4:].copy_(x)
        return self.o(out[:, 2:6])


class AddedToView(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        view = out[:, 1:3]
        view += self.l(x)[:, 1:3]
        return self.o(out)


class Flattened(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = x.clone()
        out.view(-1)[:].add_(self.l(x).flatten())
        out[:, 0].mul_(2)
        return out


class Scattered(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(x.shape[0], 4)
        return out.scatter_(1, torch.zeros(x.shape[0], 1, dtype=torch.long), self.l(x)[:, :1])


class Nulled(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.l(x)
        out[out < 0] = 0
        return out


@pytest.mark.parametrize(
    "kind",
    [
        Filled,
        AddedToView,
        *(
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in (Placed, Copied, Flattened, Scattered, Nulled)
        ),
    ],
)
def test_what_is_written_into_a_view_reaches_the_output(kind: type[Base], tmp_path: Path) -> None:
    model = randomise(kind()).eval()
    compiled = made(model)
    compiled.check_gradients()
    compiled.emit("onnx", tmp_path / "program.onnx")
    row = torch.randn(5, 4)
    (got,) = onnxruntime.InferenceSession(str(tmp_path / "program.onnx")).run(None, {"x": row.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.as_tensor(got), model(row))
        torch.testing.assert_close(compiled.fold()(row), model(row))


def test_what_is_written_where_nothing_reads_it_does_not_reach_the_output() -> None:
    class Unread(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scratch = torch.zeros_like(x)
            y = self.o(scratch + x)
            scratch[:, 0] = self.l(x)[:, 0]
            return y

    with pytest.raises(adaptc.SpecError, match="l is on no path to the output"):
        made(Unread())
