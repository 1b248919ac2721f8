"""Whatever form attention has in ONNX, a decoder with a cache gives what it gives without one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from adaptc.compiler.base import make_base
from adaptc.compiler.proof.cached_runner import CachedRunner
from adaptc.compiler.proof.runners import BatchRunner
from adaptc.emit.onnx.attention_forms import with_attention
from adaptc.emit.onnx.cached import NEW_TOKENS, read_signature
from adaptc.emit.onnx.evaluate import evaluate
from adaptc.emit.onnx.export import export_onnx
from adaptc.emit.onnx.functional import Functional
from adaptc.emit.onnx.norms import NormsOfSums, RootMeanSquareNorms
from adaptc.emit.onnx.runtime import onnx_runner
from adaptc.ir.graph import Graph
from adaptc.ir.module import bind
from adaptc.rewriter.cache.cache import Cache
from adaptc.rewriter.cache.inputs import new_tokens
from adaptc.rewriter.pipeline import run
from adaptc.spec.spec import load
from adaptc.tracing.trace import trace_base
from tests.decoders import BY_HAND, WIDE, WORDS
from tests.families import VOCABULARY, Zoo, close, inputs, marked, outputs, randomise
from tests.laws.test_cache import CHUNKS, DECODERS, left_padded, traced

PLAIN_BY_HAND = ("HeadsInBatch",)
"""Decoders whose products are not those of heads."""


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
    cached, report = with_attention(
        run(evaluate(graph), [Functional(), Cache(), RootMeanSquareNorms(), NormsOfSums()]), form
    )
    export_onnx(cached, path, metadata={NEW_TOKENS: new_tokens(cached)}, exact=True)
    return report


def right_padded(name: str) -> dict[str, torch.Tensor]:
    """Three rows of nine tokens, two of them padded on the right."""
    tensors = inputs(name, 3, 9)
    tensors["attention_mask"][1, 7:] = 0
    tensors["attention_mask"][2, 4:] = 0
    return tensors


def held(graph: Graph, form: str, path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Hold a file against the graph without a cache, in chunks; several tokens behind a past go row by row in `gqa`."""
    tensors = {spec.name: tensors[spec.name] for spec in graph.inputs}
    with torch.no_grad():
        want = next(iter(outputs(bind(graph).eval(), tensors, graph.outputs).values()))
    seen = tensors.get("attention_mask", torch.ones(want.shape[:2])).bool()
    for chunks in CHUNKS:
        rows = slice(1 if form == "gqa" and len(set(chunks)) > 1 else None)
        got = in_chunks(path, {name: value[rows] for name, value in tensors.items()}, chunks)
        close(got[seen[rows]], want[rows][seen[rows]])


FORMS = ("standard", "gqa")
PADDED = {"standard": left_padded, "gqa": right_padded}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", marked(DECODERS, ("llama",)))
def test_families(zoo: Zoo, tmp_path: Path, name: str, form: str) -> None:
    graph, path = zoo.graph(name), tmp_path / "decoder.onnx"
    report = write(graph, form, path)
    assert (report[form], report["plain"]) == (2, 0), report
    held(graph, form, path, PADDED[form](name))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", marked(BY_HAND, ("Decoder", "AddedMask")))
def test_decoders_written_by_hand(tmp_path: Path, name: str, form: str) -> None:
    """Their heads are of 12 features, which GroupQueryAttention does not take: ONNX's Attention does."""
    ids, path = "tokens" if name == "OtherName" else "input_ids", tmp_path / "decoder.onnx"
    graph = traced(BY_HAND[name](), ids)
    report = write(graph, form, path)
    fused = name not in PLAIN_BY_HAND
    assert (report["standard"], report["plain"]) == ((2, 0) if fused else (0, 2)), report
    assert all("a multiple of 8 is needed" in why or "no matrix products" in why for why in report["why"])
    held(graph, form, path, {ids: torch.randint(0, WORDS, (3, 9))})


@pytest.mark.parametrize(
    ("name", "window", "added"),
    [
        pytest.param("Decoder", -1, False, marks=pytest.mark.slow),
        ("AddedMask", -1, False),
        pytest.param("Alibi", -1, True, marks=pytest.mark.slow),
        ("Window", 3, False),
    ],
)
def test_masks(tmp_path: Path, name: str, window: int, added: bool) -> None:
    """A causal mask is counted, a window too; any other is added to the scores."""
    graph, path = traced(WIDE[name]()), tmp_path / "decoder.onnx"
    assert write(graph, "gqa", path)["gqa"] == 2
    for node in grouped(path):
        assert attribute(node, "local_window_size") == window
        assert (len(node.input) > 10) == added
    held(graph, "gqa", path, {"input_ids": torch.randint(0, WORDS, (3, 9))})


ROTARY: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "rope_theta": 10000.0,
        }
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", marked(ROTARY, ("mistral",)))
def test_rotary_positions_inside(tmp_path: Path, name: str) -> None:
    """Queries and keys are rotated by the operation itself, from a table of all positions."""
    import transformers

    kind = "Mistral" if name == "mistral" else "Llama"
    sizes = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = getattr(transformers, f"{kind}Config")(**sizes, **heads, **ROTARY[name])
    torch.manual_seed(0)
    randomise(getattr(transformers, f"{kind}ForCausalLM")(config)).save_pretrained(tmp_path / "base")
    base = {"model": str(tmp_path / "base"), "task": "causal-lm"}
    graph, path = trace_base(make_base(load({"base": base}))), tmp_path / "decoder.onnx"
    assert write(graph, "gqa", path)["gqa"] == 2
    for node in grouped(path):
        assert attribute(node, "do_rotary") == 1
        assert attribute(node, "local_window_size") == ROTARY[name].get("sliding_window", -1)
    counts = Counter(node.op_type for node in onnx.load(path).graph.node)
    assert (counts["SimplifiedLayerNormalization"], counts["SkipSimplifiedLayerNormalization"]) == (1, 4)
    products = 2 * len(("query, key and value", "output", "gate", "up", "down"))
    assert counts["MatMul"] == products + 1, "the head, and query, key and value as one"
    held(graph, "gqa", path, right_padded("llama"))


def grouped(path: Path) -> list[Any]:
    """The GroupQueryAttentions of a file; two of them."""
    nodes = [n for n in onnx.load(path).graph.node if n.op_type == "GroupQueryAttention"]
    assert len(nodes) == 2
    return nodes


def attribute(node: Any, name: str) -> Any:
    return next(onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name)


@pytest.mark.parametrize("name", ["bert", "block"])
def test_without_a_cache(zoo: Zoo, tmp_path: Path, name: str) -> None:
    """An encoder's attention has the form too, and a row that sees nothing gives what it gives in torch."""
    graph, path = zoo.graph(name), tmp_path / "encoder.onnx"
    encoder, report = with_attention(evaluate(graph), "standard")
    assert (report["standard"], report["plain"]) == ((2, 0) if name == "bert" else (0, 1)), report
    export_onnx(encoder, path)
    tensors = inputs(name, 3, 9, pad=True)
    mask = tensors["attention_mask" if name == "bert" else "mask"]
    mask[0] = 0
    with torch.no_grad():
        want = outputs(bind(graph).eval(), tensors, graph.outputs)
    for got, value in zip(onnx_runner(path)(tensors), want.values(), strict=True):
        close(got, value)
