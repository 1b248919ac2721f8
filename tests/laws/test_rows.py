"""What holds for every method of the registry where each row of a batch has its own adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adaptc.compiler.compiled import Compiled
from adaptc.compiler.rows_graph import merged_rows
from adaptc.emit.onnx.runtime import open_session, session_call
from adaptc.errors import AdaptcError
from adaptc.ir.module import bind
from adaptc.ir.row_calls import IDS
from adaptc.methods.head import HeadMethod
from adaptc.methods.method import METHODS
from adaptc.weights import Held
from tests.families import Zoo, close, differs, entry, inputs, outputs, perturbed

QUICK = ("lora", "prefix")
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
