"""Every method with virtual tokens, wherever a decoder has a cache: the tokens of the graph without one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptc.compiler.compiled import Compiled
from adaptc.emit.onnx.cached import read_signature
from adaptc.emit.onnx.runtime import onnx_runner
from adaptc.errors import RefusedError
from adaptc.generation.genai import GenaiModel
from adaptc.ir.module import bind
from adaptc.methods.method import METHODS
from adaptc.rewriter.cache.signature import CacheSignature
from tests.families import Zoo, entry, perturb
from tests.laws.test_served import EOS, INT4, prompts, uncached

METHODS_OF_TOKENS = sorted(name for name, cls in METHODS.items() if cls.kinds & {"input", "attention"})
NEW = 24
Continue = Callable[[list[int]], list[int]]


def in_torch(made: Compiled, _: Path) -> Continue:
    def tokens(prompt: list[int]) -> list[int]:
        ids = torch.tensor([prompt])
        written = made.generate(ids, NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
        return written[0, len(prompt) :].tolist()

    return tokens


def in_onnx(form: str) -> Callable[[Compiled, Path], Continue]:
    def emitted(made: Compiled, folder: Path) -> Continue:
        path = folder / "model.onnx"
        options = {"adapters": "live", "round_activations": False}
        made.emit("onnx", path, cache=True, attention=form, **options)
        signature = read_signature(path)
        assert signature is not None
        run = onnx_runner(path)
        return lambda prompt: greedy(run, signature, prompt)

    return emitted


def in_genai(made: Compiled, folder: Path) -> Continue:
    made.emit("genai", folder / "serve", eos_token_id=EOS, adapters="live", round_activations=False)
    model = GenaiModel(folder / "serve")
    return lambda prompt: model.greedy([prompt], NEW)[0]


def greedy(run: Any, signature: CacheSignature, prompt: list[int]) -> list[int]:
    """The likeliest tokens by a program, whose caller knows of real tokens alone."""
    text, past, done = list(prompt), signature.empty(1), 0
    while len(text) < len(prompt) + NEW:
        ids = torch.tensor([text])
        whole = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "position_ids": torch.arange(len(text))[None],
        }
        results = run({**signature.part(whole, done, len(text)), **past})
        outputs = dict(zip(signature.outputs, results, strict=True))
        past, done = signature.next_past(outputs), len(text)
        text.append(int(outputs["logits"][0, -1].argmax()))
    return text[len(prompt) :]


WAYS: dict[str, Callable[[Compiled, Path], Continue]] = {
    "torch": in_torch,
    "onnx standard": in_onnx("standard"),
    "onnx gqa": in_onnx("gqa"),
    "genai": in_genai,
}
CASES = [
    pytest.param(
        method,
        way,
        bits,
        marks=[] if (method, way, bits) == ("p-tuning", "onnx standard", "float") else pytest.mark.slow,
    )
    for method in METHODS_OF_TOKENS
    for way in WAYS
    for bits in ("float", "int4")
]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "way", "bits"), CASES)
def test_tokens_are_those_of_the_graph_without_a_cache(
    zoo: Zoo, method: str, way: str, bits: str, tmp_path: Path
) -> None:
    made = zoo.compiled("llama", [entry(method, "llama")], **(INT4 if bits == "int4" else {}))
    perturb(made.module)
    tokens, module, compared = WAYS[way](made, tmp_path), bind(made.live_graph()).eval(), 0
    for prompt in prompts():
        want = uncached(module, prompt, NEW, frozenset({EOS} if way == "genai" else ()))
        assert tokens(prompt)[: len(want)] == want
        compared += len(want)
    assert compared > NEW, "too few tokens before an end or a near tie"


@pytest.mark.parametrize(
    "way",
    [
        "torch",
        pytest.param("onnx standard", marks=pytest.mark.slow),
        pytest.param("genai", marks=pytest.mark.slow),
    ],
)
def test_tokens_among_the_real_ones_are_refused(zoo: Zoo, way: str, tmp_path: Path) -> None:
    made = zoo.compiled("llama", [{**entry("p-tuning", "llama"), "positions": [0, 2, 4]}])
    with pytest.raises(RefusedError, match="a cache can hold them in front alone") as caught:
        WAYS[way](made, tmp_path)([1, 2])
    assert "leave `positions` out, or emit without a cache" in str(caught.value)
    assert not any(tmp_path.iterdir())
