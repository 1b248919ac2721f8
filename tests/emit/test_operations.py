"""Operations that ONNX has no form for itself: decomposed, with every output and no write, at any size."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import adaptc
from adaptc.emit.onnx.runtime import onnx_runner
from adaptc.errors import RefusedError, TraceError
from tests.families import randomise
from tests.small_models import LORA, Calls, near

IMAGE = {0: "batch"}
SEQUENCE = {0: "batch", 1: "time"}


def grid(m: Any, x: torch.Tensor) -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.arange(x.shape[1]), torch.arange(8), indexing="ij")
    return m.l(x) + rows + columns


CASES: dict[str, tuple[Callable[..., Any], dict[str, nn.Module], tuple[int, ...], dict[int, str]]] = {
    "meshgrid": (grid, {}, (2, 5, 8), SEQUENCE),
    "adaptive-max-pool-1": (
        lambda m, x: F.adaptive_max_pool1d(m.l(x), 1).flatten(1), {}, (2, 3, 8), IMAGE,
    ),
    "adaptive-max-pool-2": (
        lambda m, x: F.adaptive_max_pool2d(m.l(x), 1).flatten(1), {}, (2, 3, 6, 8), IMAGE,
    ),
    "max-pool-with-indices": (
        lambda m, x: F.max_pool2d(m.l(x), 2, return_indices=True), {}, (2, 3, 6, 8), IMAGE,
    ),
    "topk": (lambda m, x: tuple(torch.topk(m.l(x), 3)), {}, (2, 5, 8), SEQUENCE),
    "var-mean": (lambda m, x: torch.var_mean(m.l(x), -1), {}, (2, 5, 8), SEQUENCE),
    "aminmax": (lambda m, x: tuple(torch.aminmax(m.l(x), dim=-1)), {}, (2, 5, 8), SEQUENCE),
    "cosine-similarity": (
        lambda m, x: F.cosine_similarity(m.l(x[:, 0]), m.l(x[:, 1]), dim=-1), {}, (3, 2, 8), IMAGE,
    ),
    "average-over-time": (
        lambda m, x: F.adaptive_avg_pool1d(m.l(x).transpose(1, 2), 1).flatten(1), {}, (2, 5, 8), IMAGE,
    ),
    "average-of-channels-last": (
        lambda m, x: F.adaptive_avg_pool2d(m.l(x).permute(0, 3, 1, 2), 1).flatten(1), {}, (2, 4, 4, 8), IMAGE,
    ),
    "rms-norm": (lambda m, x: m.l(m.n(x)), {"n": nn.RMSNorm(8)}, (2, 5, 8), SEQUENCE),
    "rms-norm-eps": (lambda m, x: m.l(m.n(x)), {"n": nn.RMSNorm(8, eps=1e-5)}, (2, 5, 8), SEQUENCE),
    "linear-interpolation": (
        lambda m, x: F.interpolate(m.l(x).transpose(1, 2), scale_factor=2.0, mode="linear"),
        {}, (2, 5, 8), SEQUENCE,
    ),
    "bicubic-interpolation": (
        lambda m, x: F.interpolate(m.l(x), scale_factor=1.5, mode="bicubic"),
        {}, (2, 3, 5, 8), {0: "batch", 2: "height"},
    ),
    "nearest-exact": (
        lambda m, x: F.interpolate(m.l(x), size=(7, 5), mode="nearest-exact"),
        {}, (2, 3, 12, 8), {0: "batch", 2: "height"},
    ),
    "selection": (lambda m, x: m.l(x)[m.l(x).sum(-1) > 0], {}, (2, 5, 8), SEQUENCE),
    "positions": (lambda m, x: (torch.where(m.l(x) > 0)[0], m.l(x)), {}, (5, 8), IMAGE),
    "batch-statistics": (
        lambda m, x: m.n(m.l(x)), {"n": nn.BatchNorm1d(3, track_running_stats=False)}, (2, 3, 8), IMAGE,
    ),
    "mean-of-a-bag": (
        lambda m, x: m.l(m.e((x.abs() * 9).long().clamp(max=19)[..., 0])),
        {"e": nn.EmbeddingBag(20, 8)}, (2, 5, 8), IMAGE,
    ),
    "written-rows": (
        lambda m, x: torch.zeros(3, 8).index_copy_(0, torch.tensor([2, 0]), m.l(x).mean(0)[:2]).cumsum(0),
        {}, (2, 5, 8), IMAGE,
    ),
}  # fmt: skip


def exported(path: Path, model: nn.Module, x: torch.Tensor, dynamic: Any, **options: Any) -> Any:
    """A function that runs the ONNX program of a model with LoRA on its layer `l`."""
    made = adaptc.compile(
        {"adapt": [{**LORA, "target": "l"}]}, model=model, example_inputs=(x,), dynamic={"x": dynamic}
    )
    made.emit("onnx", path / "m.onnx", **options)
    return onnx_runner(path / "m.onnx")


def agree(program: Any, model: nn.Module, x: torch.Tensor) -> bool:
    """Whether a program gives what its model does."""
    with torch.no_grad():
        wanted = model(x)
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    pairs = zip(program({"x": x}), wanted, strict=True)
    return all(a.shape == b.shape and near(a.float(), b.float()) for a, b in pairs)


QUICK = {
    "meshgrid",
    "adaptive-max-pool-2",
    "average-of-channels-last",
    "linear-interpolation",
    "positions",
    "lstm",
    "rnn-both-ways",
}


def quick_or_slow(names: Iterable[str]) -> list[Any]:
    """The names as parameters: all but a few are marked as slow."""
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", quick_or_slow(CASES))
def test_an_operation_is_exported_for_any_size(name: str, tmp_path: Path) -> None:
    forward, layers, shape, dynamic = CASES[name]
    model = randomise(Calls(forward, l=nn.Linear(8, 8), **layers)).eval()
    program = exported(tmp_path, model, torch.randn(shape), dynamic)
    for more in (0, 3):
        sizes = [size + more if axis in dynamic else size for axis, size in enumerate(shape)]
        assert agree(program, model, torch.randn(sizes))


@pytest.mark.slow
@pytest.mark.parametrize("eps", [None, 1e-6])
@pytest.mark.parametrize("opset", [18, 20, 22, 23, 24])
def test_rms_norm_is_exported_at_every_opset(opset: int, eps: float | None, tmp_path: Path) -> None:
    model = randomise(Calls(lambda m, x: m.l(m.n(x)), l=nn.Linear(8, 8), n=nn.RMSNorm(8, eps=eps)))
    program = exported(tmp_path, model, torch.randn(2, 5, 8), SEQUENCE, opset=opset)
    assert agree(program, model, torch.randn(4, 7, 8))


def operations_of(path: Path) -> list[str]:
    import onnx

    return [node.op_type for node in onnx.load(path).graph.node]


RECURRENT: dict[str, dict[str, Any]] = {
    "lstm": {"kind": nn.LSTM},
    "lstm-both-ways": {"kind": nn.LSTM, "bidirectional": True, "num_layers": 2},
    "lstm-time-first": {"kind": nn.LSTM, "batch_first": False, "bias": False},
    "gru": {"kind": nn.GRU},
    "gru-both-ways": {"kind": nn.GRU, "bidirectional": True, "num_layers": 2, "dropout": 0.1},
    "gru-time-first": {"kind": nn.GRU, "batch_first": False, "bias": False},
    "rnn": {"kind": nn.RNN},
    "rnn-both-ways": {"kind": nn.RNN, "bidirectional": True, "num_layers": 2, "nonlinearity": "relu"},
    "rnn-time-first": {"kind": nn.RNN, "batch_first": False, "bias": False},
}


def recurrent(kind: Any, batch_first: bool = True, **options: Any) -> nn.Module:
    """A linear layer and a recurrent one, whose outputs and last states are all given."""

    def forward(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs, states = m.r(m.l(x))
        return outputs, *(states if isinstance(states, tuple) else (states,))

    layer = kind(8, 4, batch_first=batch_first, **options)
    return randomise(Calls(forward, l=nn.Linear(8, 8), r=layer)).eval()


@pytest.mark.parametrize("name", quick_or_slow(RECURRENT))
def test_a_recurrent_layer_is_one_operation_for_any_length(name: str, tmp_path: Path) -> None:
    model, layers = recurrent(**RECURRENT[name]), RECURRENT[name].get("num_layers", 1)
    program = exported(tmp_path, model, torch.randn(2, 5, 8), SEQUENCE)
    assert all(agree(program, model, torch.randn(sizes)) for sizes in [(2, 5, 8), (3, 9, 8), (1, 1, 8)])
    kind = name.split("-")[0].upper()
    assert operations_of(tmp_path / "m.onnx").count(kind) == layers


def test_a_recurrent_layer_of_any_length_is_trained_and_saved(tmp_path: Path) -> None:
    model = recurrent(nn.LSTM)
    made = adaptc.compile(
        {"adapt": [{**LORA, "target": "l"}]},
        model=model,
        example_inputs=(torch.randn(2, 5, 8),),
        dynamic={"x": SEQUENCE},
    )
    x = torch.randn(3, 9, 8)
    made.module.train()(x)[0].sum().backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all() for p in made.module.parameters() if p.requires_grad
    )
    made.emit("torch", tmp_path / "torch")
    with torch.no_grad():
        assert near(adaptc.load(tmp_path / "torch").eval()(x)[0], model(x)[0])


def test_a_projected_lstm_is_unrolled_at_a_fixed_length(tmp_path: Path) -> None:
    model = recurrent(nn.LSTM, proj_size=3)
    program = exported(tmp_path, model, torch.randn(2, 5, 8), {0: "batch"})
    assert agree(program, model, torch.randn(4, 5, 8))


def test_a_projected_lstm_of_any_length_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RefusedError) as error:
        exported(tmp_path, recurrent(nn.LSTM, proj_size=3), torch.randn(2, 5, 8), SEQUENCE)
    text = str(error.value)
    assert "ONNX has no form of aten.lstm.input for any size of `time`" in text
    assert "in r, from test_operations.py" in text
    assert "write the size that it is run with as a number in place of `time`" in text


def test_a_packed_sequence_is_refused_in_words(tmp_path: Path) -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l, self.r = nn.Linear(8, 8), nn.GRU(8, 4, batch_first=True)

        def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(self.l(x), lengths, batch_first=True)
            return nn.utils.rnn.pad_packed_sequence(self.r(packed)[0], batch_first=True)[0]

    with pytest.raises(TraceError) as error:
        adaptc.compile(
            {"adapt": [{**LORA, "target": "l"}]},
            model=Packed(),
            example_inputs=(torch.randn(2, 5, 8), torch.tensor([5, 3])),
            dynamic={"x": SEQUENCE, "lengths": {0: "batch"}},
        )
    assert "a packed sequence has sizes that depend on the values of a tensor" in str(error.value)
    assert "packed_sequence(" in str(error.value)
