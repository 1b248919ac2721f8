"""A cache changes nothing: tokens in chunks give what all tokens at once give; what a cache cannot hold is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from adaptc.compiler.base import make_base
from adaptc.errors import RefusedError
from adaptc.ir.graph import Graph
from adaptc.ir.module import bind
from adaptc.rewriter.cache.cache import Cache
from adaptc.rewriter.pipeline import run
from adaptc.spec.spec import load
from adaptc.tracing.trace import trace_base
from tests.chunked import chunked
from tests.decoders import BY_HAND, MIXES_TOKENS, WORDS
from tests.families import DECODERS, Zoo, close, entry, inputs, marked, outputs, perturb, randomise

BESIDE_AN_ENCODER = ("t5", "bart", "whisper")
CHUNKS = ((9,), (1,) * 9, (4, 1, 3, 1))


def left_padded(name: str) -> dict[str, torch.Tensor]:
    """Three rows of nine tokens, two of them padded on the left."""
    tensors = inputs(name, 3, 9)
    tensors["attention_mask"][1, :3] = 0
    tensors["attention_mask"][2, :5] = 0
    tensors["position_ids"] = (tensors["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return tensors


@pytest.mark.parametrize("name", marked(DECODERS, ("llama", "gpt2")))
def test_chunks_give_what_the_whole_gives(zoo: Zoo, name: str) -> None:
    graph, tensors = zoo.graph(name), left_padded(name)
    cached = run(graph, [Cache()])
    with torch.no_grad():
        want = outputs(bind(graph).eval(), tensors, graph.outputs)["logits"]
    seen = tensors["attention_mask"].bool()
    for chunks in CHUNKS:
        close(chunked(cached, tensors, "input_ids", chunks)[seen], want[seen])


@pytest.mark.parametrize("name", marked(BESIDE_AN_ENCODER, ()))
def test_a_decoder_beside_an_encoder(zoo: Zoo, name: str) -> None:
    graph, tensors = zoo.graph(name), inputs(name, 2, 9, pad=True)
    cached = run(graph, [Cache()])
    count = tensors["decoder_input_ids"].shape[1]
    with torch.no_grad():
        want = outputs(bind(graph).eval(), tensors, graph.outputs)["logits"]
    for chunks in ((count,), (1,) * count, (4, count - 4)):
        close(chunked(cached, tensors, "decoder_input_ids", chunks), want)


def traced(model: nn.Module, name: str = "input_ids") -> Graph:
    dims = {name: "int64[batch, seq]"}
    return trace_base(make_base(load({"inputs": dims}), randomise(model).eval()))


QUICK_MIXES = (
    *(
        "convolution",
        "cumsum",
        "mean",
        "shift",
        "first token",
        "all with all",
        "mask of the ids",
        "bidirectional",
    ),
    "one ahead",
)
"""Those that stand for all in the quick tests: one of each rule."""


@pytest.mark.parametrize("name", marked(BY_HAND, ("Alibi", "BufferMask", "Window")))
def test_decoders_written_by_hand(name: str) -> None:
    ids = "tokens" if name == "OtherName" else "input_ids"
    graph = traced(BY_HAND[name](), ids)
    cached = run(graph, [Cache()])
    tensors = {ids: torch.randint(0, WORDS, (3, 9))}
    with torch.no_grad():
        want = bind(graph).eval()(**tensors)
    for chunks in CHUNKS:
        close(chunked(cached, tensors, ids, chunks), want)


@pytest.mark.parametrize("name", marked(MIXES_TOKENS, QUICK_MIXES))
def test_tokens_that_meet_elsewhere_are_refused_with_node_and_line(name: str) -> None:
    make, says = MIXES_TOKENS[name]
    with pytest.raises(RefusedError) as caught:
        run(traced(make()), [Cache()])
    assert says in str(caught.value)
    assert "decoders.py:" in str(caught.value)


QUICK = (("lora", True), ("prefix", False), ("lora over nf4", False))
ENTRIES: dict[str, dict[str, Any]] = {
    "lora": {"adapt": [entry("lora", "llama")]},
    "prefix": {"adapt": [entry("prefix", "llama")]},
    "bottleneck": {"adapt": [entry("bottleneck", "llama")]},
    "int4": {"quantize": [{"method": "int4", "target": "all-linear", "block_size": 16}]},
    "lora over nf4": {
        "quantize": [{"method": "nf4", "target": "all-linear", "block_size": 16}],
        "adapt": [entry("lora", "llama")],
    },
}


@pytest.mark.parametrize(
    ("name", "folded"),
    [
        pytest.param(name, folded, marks=[pytest.mark.slow] * ((name, folded) not in QUICK))
        for name in ENTRIES
        for folded in (False, True)
        if not (folded and "over" in name)
    ],
)
def test_adapted_and_quantized_decoders(zoo: Zoo, name: str, folded: bool) -> None:
    spec = ENTRIES[name]
    compiled = zoo.compiled("llama", spec.get("adapt", []), **{k: v for k, v in spec.items() if k != "adapt"})
    perturb(compiled.module)
    graph = compiled.folded_graph() if folded else compiled.live_graph()
    tensors = left_padded("llama")
    with torch.no_grad():
        want = outputs(bind(graph).eval(), tensors, graph.outputs)["logits"]
    seen = tensors["attention_mask"].bool()
    cached = run(graph, [Cache()])
    for chunks in CHUNKS:
        close(chunked(cached, tensors, "input_ids", chunks)[seen], want[seen])
