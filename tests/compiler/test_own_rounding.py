"""What is rounding is no fault: the tolerance knows the model's own, and labels of near ties are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import adaptc
from adaptc.compiler.proof.proof import prove
from adaptc.compiler.proof.runners import BatchRunner
from adaptc.errors import ProofError
from adaptc.ir.graph import Graph
from adaptc.ir.interpreter import Interpreter, Run
from adaptc.tracing.module import from_examples
from adaptc.tracing.trace import trace_base


class Sines(nn.Module):
    """Every layer makes the rounding before it larger."""

    def __init__(self, depth: int, gain: float = 4.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gain = gain
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.sin(self.gain * layer(x))
        return x


def traced(depth: int) -> tuple[Graph, Run]:
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    graph = trace_base(from_examples(Sines(depth).eval(), (x,), {"x": {0: "batch"}}))
    return graph, Interpreter(graph).on({"rows": {"x": x}})


def other(reference: Run, change: Any) -> Run:
    (value,) = reference.outcomes["rows"]  # type: ignore[misc]
    return BatchRunner(lambda batch: [change(value)]).on(reference.batches)


def test_the_reference_is_the_model_in_float64() -> None:
    graph, reference = traced(14)
    wide = Interpreter(graph, torch.float64).on(reference.batches)
    proof = prove("test", reference, wide, 6.1e-5, graph)
    assert proof.relative == 0.0
    assert proof.rounding is not None
    assert 6.1e-5 < proof.rounding < 1e-2


def test_what_the_dtype_allows_is_the_floor() -> None:
    graph, reference = traced(1)
    proof = prove("test", reference, other(reference, lambda y: y * (1 + 5e-5)), 6.1e-5, graph)
    assert proof.rounding is None
    assert proof.tolerance == 6.1e-5
    with pytest.raises(ProofError, match=r"of 6\.1e-05 allowed \(the model's own rounding is .*e-0[78]\)"):
        prove("test", reference, other(reference, lambda y: y * (1 + 1e-4)), 6.1e-5, graph)


def test_no_rounding_allows_more_than_a_hundredth() -> None:
    graph, reference = traced(14)
    proof = prove("test", reference, other(reference, lambda y: y * (1 + 1e-4)), 6.1e-5, graph)
    assert proof.tolerance < 1e-2
    with pytest.raises(ProofError, match="relative error"):
        prove("test", reference, other(reference, lambda y: y * (1 + 1e-2)), 6.1e-5, graph)
    deeper, reference = traced(22)
    with pytest.raises(ProofError, match=r"output is lost in the model's own rounding, .*: rows"):
        prove("test", reference, other(reference, lambda y: y * (1 + 1e-4)), 6.1e-5, deeper)


def test_a_reference_that_is_another_model_stays_the_reference() -> None:
    """A graph in float64 does not excuse that it is not the model, though it is all that was traced."""
    graph, right = traced(14)
    reference = other(right, lambda y: 2 * y)
    with pytest.raises(ProofError, match=r"relative error 5\.0e-01"):
        prove("trace", reference, right, 6.1e-5, graph)


@pytest.mark.slow
def test_a_strong_adapter_on_a_deep_encoder_is_no_fault(tmp_path: Path) -> None:
    """A ModernBERT, whose fold is off by more than float32's tolerance with these adapters."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 99, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    config = transformers.ModernBertConfig(**sizes, **ids, num_hidden_layers=12, max_position_embeddings=64)
    torch.manual_seed(2)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path / "base")
    lora = {"method": "lora", "target": "all-linear", "r": 4, "alpha": 64}
    compiled = adaptc.compile({"base": {"model": str(tmp_path / "base")}, "adapt": [lora]})
    generator = torch.Generator().manual_seed(2)
    for parameter in compiled.module.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.5, generator=generator)
    compiled.emit("onnx", tmp_path / "model.onnx")
    proofs = {proof.name: proof for proof in compiled.proofs}
    for name in ("fold", "onnx, folded"):
        assert proofs[name].relative <= proofs[name].tolerance < 1e-2
    assert any(proof.rounding for proof in proofs.values()), "no proof needed it"


class Classifier(nn.Module):
    """Gives its label too; some logits nearly tie."""

    def __init__(self, logits: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.logits = logits
        blocks = [nn.Sequential(nn.Linear(96, 96), nn.LayerNorm(96), nn.GELU()) for _ in range(6)]
        self.body, self.head = nn.Sequential(*blocks), nn.Linear(96, 10)
        with torch.no_grad():
            self.head.weight.mul_(1e-4).add_(torch.randn(1, 96))
            self.head.bias.zero_()

    def forward(self, x: torch.Tensor) -> Any:
        logits = self.head(self.body(x))
        return (logits, logits.argmax(-1)) if self.logits else (x.sum(), logits.argmax(-1))


@pytest.mark.parametrize("runtime", ["standard", "onnxruntime"])
def test_labels_of_a_quantized_classifier(runtime: str, tmp_path: Path) -> None:
    """Activations are rounded to 8 bits, which turns labels whose logits nearly tie; no other one."""
    spec = {
        "quantize": [{"method": "int8", "target": "*body*"}],
        "adapt": [{"method": "lora", "target": "body.0.0", "r": 2}],
        "passes": ["insert", "fold", "quantize"],
    }
    x = torch.randn(16, 9, 96, generator=torch.Generator().manual_seed(0))
    dynamic = {"x": {0: "batch", 1: "seq"}}
    compiled = adaptc.compile(spec, model=Classifier().eval(), example_inputs=(x,), dynamic=dynamic)
    compiled.emit("onnx", tmp_path / "model.onnx", target_runtime=runtime)
    logits, labels = onnxruntime.InferenceSession(str(tmp_path / "model.onnx")).run(None, {"x": x.numpy()})
    taken = np.take_along_axis(logits, labels[..., None], -1)[..., 0]
    assert (taken >= logits.max(-1) - 1e-6).all()
    notes = [note for proof in compiled.proofs for note in proof.notes]
    assert any("between near ties" in note for note in notes), "no label was turned"
