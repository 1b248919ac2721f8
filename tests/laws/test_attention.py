"""Whatever form attention has in ONNX, a decoder with a cache gives what it gives without one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptc.compiler.cached_runner import CachedRunner
from adaptc.compiler.onnx_artifact import lowered
from adaptc.compiler.runners import BatchRunner
from adaptc.emit.onnx.cached import NEW_TOKENS, read_signature
from adaptc.emit.onnx.evaluate import evaluate
from adaptc.emit.onnx.export import export_onnx
from adaptc.emit.onnx.runtime import onnx_runner
from adaptc.emit.onnx.standard_attention import attention_report
from adaptc.ir.graph import Graph
from adaptc.ir.module import bind
from adaptc.rewriter.cache.signature import new_tokens
from adaptc.spec.emit import OnnxEmit
from tests.decoders import BY_HAND, WORDS
from tests.families import Zoo, close, inputs, marked, outputs
from tests.laws.test_cache import CHUNKS, DECODERS, left_padded, traced

WRITTEN_OUT = ("gemma2",)
"""Families whose attention is several operations, for its capped scores."""
WRITTEN_OUT_BY_HAND = ("BufferMask", "Einsum", "HeadsInBatch")


def entry_of(form: str) -> OnnxEmit:
    return OnnxEmit.model_validate({"format": "onnx", "path": "x", "cache": True, "attention": form})


def in_chunks(path: Path, tensors: dict[str, torch.Tensor], chunks: Sequence[int]) -> torch.Tensor:
    """The first output of a file with a cache, for all tokens, some at a time."""
    signature = read_signature(path)
    assert signature is not None
    runner = CachedRunner(BatchRunner(onnx_runner(path)), signature, lambda _: chunks)
    outcome = runner.on({"": tensors}).outcomes[""]
    assert not isinstance(outcome, Exception), outcome
    return outcome[0]


def write(graph: Graph, form: str, path: Path) -> dict[str, Any]:
    """Write a decoder with a cache; gives how its attentions are written."""
    cached = lowered(evaluate(graph), entry_of(form))
    export_onnx(cached, path, metadata={NEW_TOKENS: new_tokens(cached)}, exact=True)
    return attention_report(cached, form)


@pytest.mark.parametrize("name", marked(DECODERS, ("llama", "gpt2")))
def test_families(zoo: Zoo, tmp_path: Path, name: str) -> None:
    graph, path = zoo.graph(name), tmp_path / "decoder.onnx"
    report = write(graph, "standard", path)
    fused = name not in WRITTEN_OUT
    assert (report["standard"], report["plain"]) == ((2, 0) if fused else (0, 2)), report
    tensors = {k: v for k, v in left_padded(name).items() if k in {spec.name for spec in graph.inputs}}
    with torch.no_grad():
        want = outputs(bind(graph).eval(), tensors, graph.outputs)["logits"]
    seen = tensors["attention_mask"].bool()
    for chunks in CHUNKS:
        close(in_chunks(path, tensors, chunks)[seen], want[seen])


@pytest.mark.parametrize("name", marked(BY_HAND, ("Decoder", "AddedMask")))
def test_decoders_written_by_hand(tmp_path: Path, name: str) -> None:
    ids, path = "tokens" if name == "OtherName" else "input_ids", tmp_path / "decoder.onnx"
    graph = traced(BY_HAND[name](), ids)
    report = write(graph, "standard", path)
    fused = name not in WRITTEN_OUT_BY_HAND
    assert (report["standard"], report["plain"]) == ((2, 0) if fused else (0, 2)), report
    tensors = {ids: torch.randint(0, WORDS, (3, 9))}
    with torch.no_grad():
        want = bind(graph).eval()(**tensors)
    for chunks in CHUNKS:
        close(in_chunks(path, tensors, chunks), want)


@pytest.mark.parametrize("name", ["bert", "block"])
def test_without_a_cache(zoo: Zoo, tmp_path: Path, name: str) -> None:
    """An encoder's attention has the form too, and a row that sees nothing gives what it gives in torch."""
    graph, path = zoo.graph(name), tmp_path / "encoder.onnx"
    entry = OnnxEmit.model_validate({"format": "onnx", "path": "x", "attention": "standard"})
    encoder = lowered(evaluate(graph), entry)
    report = attention_report(encoder, "standard")
    assert (report["standard"], report["plain"]) == ((2, 0) if name == "bert" else (0, 1)), report
    export_onnx(encoder, path)
    tensors = inputs(name, 3, 9, pad=True)
    mask = tensors["attention_mask" if name == "bert" else "mask"]
    mask[0] = 0
    with torch.no_grad():
        want = outputs(bind(graph).eval(), tensors, graph.outputs)
    for got, value in zip(onnx_runner(path)(tensors), want.values(), strict=True):
        close(got, value)
