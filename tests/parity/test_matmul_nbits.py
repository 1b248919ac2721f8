"""MatMulNBits beside the torch module, for every bits, block and symmetry: one program with a layer of each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import adaptc
from adaptc.compiler.compiled import Compiled
from adaptc.emit.onnx.rounding import EXACT, rounded
from adaptc.emit.onnx.runtime import onnx_runner
from tests.families import close, randomise

BITS, BLOCKS = (2, 4, 8), (16, 32, 64, 128, 256)
COLUMNS, ROWS = 300, 37
"""No block divides the one, no byte of 2 or 4 bits the other."""
KINDS = {
    f"b{bits}_{block}_{'s' if symmetric else 'a'}": (bits, block, symmetric)
    for bits in BITS
    for block in BLOCKS
    for symmetric in (True, False)
}


class Layers(nn.Module):
    """A layer of each kind, all on the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(COLUMNS, ROWS) for name in KINDS})

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.layers[name](x) for name in KINDS)


@pytest.fixture(scope="module")
def made() -> Compiled:
    quantize = [
        {"method": f"int{bits}", "block_size": block, "symmetric": symmetric, "target": f"layers.{name}"}
        for name, (bits, block, symmetric) in KINDS.items()
    ]
    return adaptc.compile(
        {"quantize": quantize},
        model=randomise(Layers()).eval(),
        example_inputs=(torch.randn(3, 17, COLUMNS),),
        dynamic={"x": {0: "batch", 1: "seq"}},
    )


@pytest.mark.parametrize("shape", [pytest.param((2, 5), marks=pytest.mark.slow), (1, 1), (4, 33)])
@pytest.mark.parametrize("runtime", ["onnxruntime", pytest.param("standard", marks=pytest.mark.slow)])
def test_with_activations_as_they_are(
    made: Compiled, runtime: str, shape: tuple[int, int], tmp_path: Path
) -> None:
    made.emit("onnx", tmp_path / "m.onnx", round_activations=False, target_runtime=runtime, opset=25)
    x = torch.randn(*shape, COLUMNS)
    with torch.no_grad():
        want = made.fold()(x)
    for a, b in zip(onnx_runner(tmp_path / "m.onnx", exact=True)({"x": x}), want, strict=True):
        close(a, b, epsilons=64)


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape", [(2, 5), *(pytest.param(s, marks=pytest.mark.slow) for s in ((1, 1), (4, 33)))]
)
def test_with_rounded_activations(made: Compiled, shape: tuple[int, int], tmp_path: Path) -> None:
    made.emit("onnx", tmp_path / "m.onnx")
    x = torch.randn(*shape, COLUMNS)
    quantized = {q.site.module: q.quantization for q in made.graph.quantized.values()}
    got = onnx_runner(tmp_path / "m.onnx")({"x": x})
    for (name, (bits, block, _)), value in zip(KINDS.items(), got, strict=True):
        layer = made.base.source.model.get_submodule(f"layers.{name}")  # type: ignore[union-attr]
        seen = x if (bits, block) in EXACT else rounded(x, block)
        with torch.no_grad():
            want = nn.functional.linear(seen, quantized[f"layers.{name}"].dequantized(), layer.bias)
        close(value, want, epsilons=64)
