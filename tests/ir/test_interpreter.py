"""A compile holds few weights at once, and what it proves in parts is what runs as a whole."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import adaptc
from adaptc.compiler.artifacts.emit import emit_all
from adaptc.compiler.proof.inputs import batches
from adaptc.compiler.proof.proof import prove, tolerance
from adaptc.compiler.proof.runners import module_call
from adaptc.emit.onnx import export as emit_onnx
from adaptc.emit.onnx import partitioned as pieces
from adaptc.emit.onnx.evaluate import evaluate
from adaptc.emit.onnx.export import export_onnx
from adaptc.emit.onnx.runtime import onnx_runner
from adaptc.ir.graph import Graph
from adaptc.ir.interpreter import Interpreter, numbered
from adaptc.ir.module import bind
from adaptc.progress.steps import BYTES, Step, watched
from adaptc.rewriter.catalog import load_passes
from adaptc.spec.spec import load
from adaptc.weights import Held, Weight
from tests.families import FAMILIES, Zoo, close, entry, perturb

QUICK = ("llama", "mlp")


IN_DTYPES = [
    pytest.param(name, dtype, marks=[pytest.mark.slow] * (name not in QUICK or dtype == "bfloat16"))
    for name in FAMILIES
    for dtype in ([None, "float16", "bfloat16"] if name in QUICK else [None, "bfloat16"])
]
"""Every family; in float16 those that stand for all."""


EVERY = [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in FAMILIES]


def random(zoo: Zoo, name: str, dtype: str | None = None) -> Any:
    """A family with a random adapter on it."""
    compiled = zoo.compiled(name, [entry("dora", name)], dtype)
    torch.manual_seed(1)
    for key in compiled.graph.adapter_names:
        weight: Any = compiled.graph.weights[key]
        value = weight.load() + 0.1 * torch.randn(weight.shape)
        weight.put(value.to(weight.dtype).detach)
    return compiled


# sweeps


@pytest.mark.parametrize(("name", "dtype"), IN_DTYPES)
def test_a_sweep_gives_what_the_bound_module_gives(zoo: Zoo, name: str, dtype: str | None) -> None:
    compiled = random(zoo, name, dtype)
    fold = load_passes()["fold"]()
    for graph in (compiled.base, compiled.live_graph(), adaptc.run(compiled.graph, [fold])):
        module = module_call(bind(graph))
        run = Interpreter(graph).on(batches(graph))
        for label, got in run.outcomes.items():
            want = module(run.batches[label])
            assert isinstance(got, list)
            assert len(got) == len(want) > 0
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("name", EVERY)
def test_a_wide_sweep_computes_in_float32(zoo: Zoo, name: str) -> None:
    narrow, graph = zoo.graph(name, "bfloat16"), zoo.graph(name).copy()
    stored = {n: w for n, w in narrow.weights.items() if w.dtype == torch.bfloat16}
    graph.weights.update({n: Held(w.load().float()) for n, w in stored.items()})
    drawn = batches(narrow)
    same = {
        label: {k: v.float() if v.dtype == torch.bfloat16 else v for k, v in batch.items()}
        for label, batch in drawn.items()
    }
    wide, plain = Interpreter(narrow, torch.float32).on(drawn), Interpreter(graph).on(same)
    for label, want in plain.outcomes.items():
        got = wide.outcomes[label]
        assert isinstance(got, list)
        assert isinstance(want, list)
        for a, b in zip(got, want, strict=True):
            close(a, b)


def test_a_batch_that_fails_does_not_stop_the_others(zoo: Zoo) -> None:
    graph = zoo.graph("mlp")
    good, bad = {"x": torch.randn(2, 16)}, {"x": torch.randn(2, 17)}
    run = Interpreter(graph).on(numbered([good, bad, good]))
    first, second, third = run.outcomes.values()
    assert list(run.taken) == ["row 1", "row 3"]
    assert isinstance(second, RuntimeError)
    assert isinstance(first, list)
    assert isinstance(third, list)
    assert torch.equal(first[0], third[0])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_mixture_of_experts_is_proved_in_half_precision(zoo: Zoo, dtype: str, tmp_path: Path) -> None:
    """Where rounding turns choices of its router; ONNX Runtime makes its own, in float32."""
    turned = 0
    for seed in range(4):
        compiled = zoo.compiled("mixtral", [entry("lora", "mixtral")], dtype, seed=seed)
        perturb(compiled.module, seed)
        compiled.emit("onnx", tmp_path / f"{seed}.onnx")
        turned += any("near equals" in str(proof) for proof in compiled.proofs)
    assert turned


@dataclass
class Count:
    """How many bytes of loaded weights are alive, and at most were."""

    alive: int = 0
    most: int = 0
    loads: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self.loads[name] = self.loads.get(name, 0) + 1
        self.alive += tensor.nbytes
        self.most = max(self.most, self.alive)
        weakref.finalize(tensor, self.drop, tensor.nbytes)

    def drop(self, count: int) -> None:
        self.alive -= count


@dataclass(eq=False)
class Counted(Weight):
    """A weight that says when it is loaded and when it is gone."""

    name: str
    weight: Weight
    count: Count

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.weight.shape

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.weight.dtype

    def load(self) -> torch.Tensor:
        tensor = self.weight.load().clone()
        self.count.add(self.name, tensor)
        return tensor


class Deep(torch.nn.Module):
    """Sixteen equal layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


@pytest.fixture
def deep() -> Any:
    torch.manual_seed(0)
    return adaptc.compile(
        {"adapt": [{"method": "lora", "target": "layers.*", "r": 2}]},
        model=Deep(), example_inputs=(torch.randn(3, 64),), dynamic={"x": {0: "batch"}},
    )  # fmt: skip


def counted(graph: Graph) -> Count:
    """Count the loads of a graph's weights from now on."""
    count = Count()
    graph.weights.update({n: Counted(n, w, count) for n, w in graph.weights.items()})
    return count


def test_a_sweep_holds_one_layer(deep: Any) -> None:
    graph = deep.base.copy()
    count = counted(graph)
    Interpreter(graph).on(batches(graph))
    assert set(count.loads.values()) == {1}, "each weight is loaded once for all batches"
    assert count.most <= 2 * 64 * 65 * 4, "more than a layer was held at once"
    assert count.alive == 0


def test_writing_beside_holds_one_weight(deep: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emit_onnx, "INLINE_LIMIT", 1000)
    graph = deep.base.copy()
    count = counted(graph)
    seen: list[tuple[int, int]] = []
    export_onnx(evaluate(graph), tmp_path / "m.onnx", wrote=lambda done, total: seen.append((done, total)))
    assert set(count.loads.values()) == {1}
    assert count.most <= 2 * 64 * 64 * 4
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] >= seen[-1][1] == 16 * 64 * 64 * 4


def test_an_interrupted_compile_leaves_nothing(
    deep: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(emit_onnx, "INLINE_LIMIT", 1000)

    class Stop:
        def begin(self, step: Step) -> None: ...
        def end(self, step: Step) -> None: ...

        def advance(self, step: Step) -> None:
            if step.unit == BYTES and step.done > step.total // 2:
                assert any(path.name.endswith(".data") for path in tmp_path.rglob("*"))
                raise KeyboardInterrupt

    (tmp_path / "mine.txt").write_text("kept")
    entries = load({"emit": [{"format": "onnx", "path": str(tmp_path / "m.onnx")}]}).emit
    with pytest.raises(KeyboardInterrupt), watched(Stop()):
        emit_all(deep.program, entries)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_weights_that_were_written_are_not_the_models_from_then_on(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the proof reads them from the file: with nothing to fold, they are the base's own."""
    monkeypatch.setattr(emit_onnx, "INLINE_LIMIT", 1000)
    compiled = zoo.compiled("mlp", [])
    for name in ("first.onnx", "second.onnx"):
        compiled.emit("onnx", tmp_path / name)
        (tmp_path / f"{name}.data").rename(tmp_path / f"{name}.moved")
    assert (tmp_path / "first.onnx.moved").read_bytes() == (tmp_path / "second.onnx.moved").read_bytes()


# pieces


@pytest.mark.parametrize("name", EVERY)
def test_in_pieces_as_whole(zoo: Zoo, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emit_onnx, "INLINE_LIMIT", 1000)
    monkeypatch.setattr(pieces, "PIECE", 1000)
    compiled = random(zoo, name)
    compiled.emit("onnx", tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx.data").is_file()
    (proof,) = [proof for proof in compiled.proofs if proof.name == "onnx, folded"]
    parts = pieces.PartitionedProgram(tmp_path / "m.onnx", tmp_path / "m.onnx")
    assert len(parts.pieces) > 2
    assert f"in {len(parts.pieces)} pieces one" in proof.coverage
    assert "pieces" not in str(proof)
    run = parts.on(batches(compiled.base))
    whole = onnx_runner(tmp_path / "m.onnx")
    epsilon = torch.finfo(torch.float32).eps
    for label, got in run.outcomes.items():
        assert isinstance(got, list)
        for a, b in zip(got, whole(run.batches[label]), strict=True):
            assert (a - b).abs().max() <= 64 * epsilon * b.abs().max()


def test_a_wrong_piece_is_found(deep: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emit_onnx, "INLINE_LIMIT", 1000)
    monkeypatch.setattr(pieces, "PIECE", 20000)
    deep.emit("onnx", tmp_path / "m.onnx")
    data = np.memmap(tmp_path / "m.onnx.data", np.float32, "r+")
    data[7 * 64 * 64 + 5] += 0.5
    data.flush()
    parts = pieces.PartitionedProgram(tmp_path / "m.onnx", tmp_path / "m.onnx")
    reference = Interpreter(deep.base).on(batches(deep.base))
    wrong = parts.on(reference.taken)
    with pytest.raises(adaptc.ProofError, match="relative error"):
        prove("onnx", reference, wrong, tolerance(deep.base))


# bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_bfloat16_is_stored_and_float32_computed(zoo: Zoo, name: str, tmp_path: Path) -> None:
    sizes = {}
    for dtype in (None, "bfloat16"):
        compiled = random(zoo, name, dtype)
        path = tmp_path / f"{dtype}.onnx"
        compiled.emit("onnx", path)
        model = onnx.load(path)
        onnx.checker.check_model(model, full_check=True)
        kinds = (onnx.TensorProto.FLOAT, onnx.TensorProto.BFLOAT16)
        sizes[dtype] = sum(len(w.raw_data) for w in model.graph.initializer if w.data_type in kinds)
    for weight in model.graph.initializer:
        if weight.data_type in kinds and len(weight.dims) == 2 and weight.name in compiled.base.weights:
            assert weight.data_type == onnx.TensorProto.BFLOAT16, weight.name
    assert 0.45 < sizes["bfloat16"] / sizes[None] < 0.6
    nodes, stored = list(model.graph.node), {w.name for w in model.graph.initializer}
    for place, node in enumerate(nodes):
        if node.op_type == "Cast" and node.input[0] in stored:
            until = next(after for after in nodes[place:] if node.output[0] in after.input)
            between = nodes[place : nodes.index(until)]
            assert {n.op_type for n in between} == {"Cast"}, f"{node.name} is held long before {until.name}"
    known = list(batches(compiled.base).values())
    module, program = module_call(bind(compiled.folded_graph())), onnx_runner(path)
    for batch in known:
        for got, want in zip(program(batch), module(batch), strict=True):
            assert got.dtype == torch.float32
            error = (got - want.float()).abs().max() / want.abs().max()
            assert error < 8 * torch.finfo(torch.bfloat16).eps
