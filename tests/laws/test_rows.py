"""What holds for every method of the registry where each row of a batch has its own adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import adaptc
from adaptc.compiler.alternatives.rows_graph import merged_rows
from adaptc.compiler.compiled import Compiled
from adaptc.emit.onnx.runtime import open_session, session_call
from adaptc.errors import AdaptcError
from adaptc.ir.module import bind
from adaptc.ir.row_calls import IDS
from adaptc.methods.head import HeadMethod
from adaptc.methods.method import METHODS
from adaptc.weights import Held
from tests.families import Zoo, close, differs, entry, inputs, outputs, perturb, perturbed

QUICK = ("lora",)
"""The methods of the quick law."""
MIXED = ((0, -1, 1, 0, 2), (2,), (-1, -1), (1, 1, 1))
"""Which adapter each row of a batch has: all, one row, the base alone, one adapter alone."""


def marked() -> list[Any]:
    return [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in sorted(METHODS)]


def one(method: str) -> str:
    """The base that stands for all."""
    kinds = METHODS[method].kinds
    return "llama" if kinds <= {"embedding", "input", "head"} else "bert" if "parameter" in kinds else "block"


def alternatives(zoo: Zoo, method: str, name: str) -> Compiled:
    """A base with three alternatives: the method, the same with other numbers and (IA)³ on top, and LoRA."""
    adapters = {
        "it": [entry(method, name)],
        "both": [entry(method, name, name="second"), entry("ia3", name)],
        "other": [entry("lora", name, r=2)],
    }
    compiled = zoo.compiled(name, [], adapters=adapters)
    for number, alternative in enumerate(compiled.program.alternatives.values()):
        graph = alternative.graph
        values = perturbed({n: graph.weights[n].load() for n in graph.adapter_names}, seed=number)
        graph.weights.update({n: Held(value) for n, value in values.items()})
    return compiled


def alone(
    compiled: Compiled, ids: torch.Tensor, batch: dict[str, torch.Tensor]
) -> list[dict[str, torch.Tensor]]:
    """What each row gets from its adapter alone, in a batch of one row."""
    programs = [compiled.program, *compiled.program.alternatives.values()]
    modules = [bind(program.live_graph()).eval() for program in programs]
    with torch.no_grad():
        return [
            outputs(
                modules[int(number) + 1],
                {n: t[row : row + 1] for n, t in batch.items()},
                compiled.base.outputs,
            )
            for row, number in enumerate(ids)
        ]


def same_outputs() -> list[Any]:
    """The methods whose alternatives have the base's outputs; a head has one of its own."""
    return [m for m in marked() if not issubclass(METHODS[getattr(m, "values", (m,))[0]], HeadMethod)]


@pytest.mark.slow
def test_rows_of_heads_have_the_outputs_of_the_base(zoo: Zoo) -> None:
    heads = {
        "one": [{"method": "probe", "classes": 5, "target": "classifier"}],
        "two": [{"method": "probe", "classes": 2, "target": "classifier"}],
    }
    compiled = zoo.compiled("bert", [], adapters=heads)
    others = [other.graph for other in compiled.program.alternatives.values()]
    module = bind(merged_rows(compiled.graph, others)).eval()
    ids, batch = torch.tensor([1, -1, 0]), inputs("bert", 3)
    want = alone(compiled, ids, batch)
    with torch.no_grad():
        got = module(**batch, **{IDS: ids})["logits"]
    for row, expected in zip(got, want, strict=True):
        close(row[: expected["logits"].shape[1]], expected["logits"][0])
    rewards = zoo.compiled("bert", [], adapters={"reward": [{"method": "reward"}]})
    with pytest.raises(AdaptcError, match="reward gives rewards, and the base logits"):
        rewards.program.by_row()


@pytest.mark.parametrize("method", same_outputs())
def test_each_row_gets_what_its_adapter_alone_gives(zoo: Zoo, method: str, tmp_path: Path) -> None:
    name = one(method)
    compiled = alternatives(zoo, method, name)
    others = [other.graph for other in compiled.program.alternatives.values()]
    module = bind(merged_rows(compiled.graph, others)).eval()
    compiled.emit("onnx", tmp_path / "many.onnx", adapters="rows")
    run = session_call(open_session(tmp_path / "many.onnx"))
    for number, mixed in enumerate(MIXED):
        ids = torch.tensor(mixed)
        batch = inputs(name, len(ids), seed=number)
        want = alone(compiled, ids, batch)
        with torch.no_grad():
            torch_rows = outputs(module, {**batch, IDS: ids}, compiled.base.outputs)
        onnx_rows = dict(zip(compiled.base.outputs, run({**batch, IDS: ids}), strict=True))
        for got in (torch_rows, onnx_rows):
            for output, value in got.items():
                close(value, torch.cat([row[output] for row in want]), 4 * 512)
    base = alone(compiled, torch.tensor([-1]), {n: t[:1] for n, t in inputs(name).items()})[0]
    for number in range(3):
        changed = alone(compiled, torch.tensor([number]), {n: t[:1] for n, t in inputs(name).items()})[0]
        for output, value in changed.items():
            differs(value, base[output])


class Images(nn.Module):
    """Convolutions: with a stride, of one pixel, dilated and without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.pixel, self.last = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 6, 3, dilation=2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.pixel(torch.relu(self.first(x))))).mean((2, 3))


class Words(nn.Module):
    """A table whose first entry is padding, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(40, 16, padding_idx=0), nn.Linear(16, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.table(ids)))


class Residual(nn.Module):
    """A feed-forward layer on a stream."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


LORA = {"method": "lora", "target": "*", "alpha": 5}
GATHERED: dict[str, tuple[type[nn.Module], Any, Any]] = {
    "bottleneck": (
        Residual,
        lambda rows: torch.randn(rows, 7, 16),
        [{"method": "bottleneck", "target": "*", "r": width} for width in (4, 2)],
    ),
    "convolution": (
        Images,
        lambda rows: torch.randn(rows, 3, 17, 24),
        [LORA | {"r": 3}, LORA | {"r": 2, "target": ["first", "last"]}],
    ),
    "embedding": (
        Words,
        lambda rows: torch.randint(0, 40, (rows, 7)),
        [LORA | {"r": 3, "target": "table"}, LORA | {"r": 2}],
    ),
}
"""What is not a linear layer -> a model, its inputs, and two adapters of different sizes."""


@pytest.mark.parametrize(
    "kind",
    [kind if kind == "bottleneck" else pytest.param(kind, marks=pytest.mark.slow) for kind in GATHERED],
)
def test_each_row_gathers_its_own(kind: str, tmp_path: Path) -> None:
    model, draw, (first, second) = GATHERED[kind]
    torch.manual_seed(0)
    name = "ids" if kind == "embedding" else "x"
    sizes = {axis: f"size{axis}" for axis in range(draw(2).dim()) if kind != "convolution" or axis != 1}
    sizes = {axis: size for axis, size in sizes.items() if kind != "bottleneck" or axis != 2}
    compiled = adaptc.compile(
        {"adapters": {"a": [first], "b": [second]}},
        model=model(),
        example_inputs=(draw(2),),
        dynamic={name: sizes},
    )
    others = [other.graph for other in compiled.program.alternatives.values()]
    merged = merged_rows(compiled.graph, others)
    operations = [name for name in merged.operations if name == "aten.where.self"]
    assert len(operations) == (kind == "embedding")  # what keeps padding without a gradient
    module: Any = compiled.module.eval()
    perturb(module)
    x, ids = draw(5), torch.tensor([0, -1, 1, 1, 0])
    each: list[torch.Tensor] = []
    for row, number in enumerate(ids):
        module.set_adapter(None if number < 0 else module.adapters[int(number)])
        each.append(module(x[row : row + 1]))
    module.set_adapter(None)
    torch.cat(each).square().sum().backward()
    want = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    rows = module(x, adapter_ids=ids)
    close(rows, torch.cat(each))
    rows.square().sum().backward()
    for n, parameter in module.named_parameters():
        if n in want:
            close(parameter.grad, want[n])
    if kind != "bottleneck":
        compiled.emit("onnx", tmp_path / "many.onnx", adapters="rows")
        run = session_call(open_session(tmp_path / "many.onnx"))
        close(run({name: x, "adapter_ids": ids})[0], rows.detach(), 4 * 512)
