"""onnxruntime-genai generates the tokens that transformers does: every family that decodes, however it is adapted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adaptc.compiler.compiled import Compiled
from adaptc.errors import RefusedError
from adaptc.generation.genai import GenaiModel
from adaptc.ir.module import bind
from tests.families import DECODERS, VOCABULARY, Zoo, entry, perturb, without_cache

WINDOWED = ("mistral", "gemma2")
"""The families whose window is so short that padding fills it."""
LENGTHS = (1, 4, 9)
"""Of the prompts; the last is longer than the sliding windows of the families, which are 4."""
NEW, EOS = 40, 97
INT4: dict[str, Any] = {
    "quantize": [{"method": "int4", "target": "all-linear", "block_size": 16}],
    "passes": ["quantize", "insert"],
}
KINDS: dict[str, tuple[str | None, dict[str, Any], dict[str, Any]]] = {
    "base": (None, {}, {}),
    "lora, folded": ("lora", {}, {}),
    "lora, live": ("lora", {}, {"adapters": "live"}),
    "prefix": ("prefix", {}, {"adapters": "live"}),
    "prompt": ("prompt", {}, {}),
    "prompt over int4": ("prompt", INT4, {"adapters": "live", "round_activations": False}),
    "lora over int4": ("lora", INT4, {"adapters": "live", "round_activations": False}),
}
"""Name -> the method, what else the spec says, and the options of `emit`."""


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]


def compiled(zoo: Zoo, family: str, kind: str) -> Compiled:
    method, spec, _ = KINDS[kind]
    made = zoo.compiled(family, [entry(method, family)] if method else [], **spec)
    if method:
        perturb(made.module)
    return made


def largest(values: torch.Tensor) -> tuple[int, bool]:
    """The token of the largest logit, and whether the next one is far from it."""
    best = values.topk(2)
    clear = best.values[0] - best.values[1] > 1e-4 * values.abs().max()
    return int(best.indices[0]), bool(clear)


def uncached(module: Any, prompt: Sequence[int], new: int, ends: frozenset[int]) -> list[int]:
    """The likeliest tokens by the graph without a cache, up to the first near tie."""
    ids = list(prompt)
    for _ in range(new):
        row = torch.tensor([ids])
        with torch.no_grad():
            tensors = {
                "input_ids": row,
                "attention_mask": torch.ones_like(row),
                "position_ids": torch.arange(len(ids))[None],
            }
            token, clear = largest(module(**tensors)["logits"][0, -1])
        if not clear:
            break
        ids.append(token)
        if token in ends:
            break
    return ids[len(prompt) :]


CASES = [
    pytest.param(family, kind, marks=[] if (family, kind) == ("llama", "lora, folded") else pytest.mark.slow)
    for family in DECODERS
    for kind in KINDS
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_tokens_are_those_of_the_graph_without_a_cache(
    zoo: Zoo, family: str, kind: str, tmp_path: Path
) -> None:
    made, (_, _, options) = compiled(zoo, family, kind), KINDS[kind]
    made.emit("genai", tmp_path / "serve", eos_token_id=EOS, **options)
    model = GenaiModel(tmp_path / "serve")
    graph = made.live_graph() if "adapters" in options else made.folded_graph()
    module, alone, compared = bind(graph).eval(), list[list[int]](), 0
    for prompt in prompts():
        want = uncached(module, prompt, NEW, model.ends)
        (got,) = model.greedy([prompt], NEW)
        compared += len(want)
        assert got[: len(want)] == want
        alone.append(got)
    assert compared > NEW, "too few tokens before an end or a near tie"
    told = json.loads((tmp_path / "serve" / "manifest.json").read_text())["products"]["genai"]["batches"]
    assert told == ("texts of one length" if family in WINDOWED else "texts of any lengths")
    if family not in WINDOWED:
        assert model.greedy(prompts(), 12) == [tokens[:12] for tokens in alone]


@pytest.mark.slow
@pytest.mark.parametrize("family", DECODERS)
def test_tokens_are_those_of_generate(zoo: Zoo, family: str, tmp_path: Path) -> None:
    """The base's own tokens, by transformers' `generate` with its cache."""
    compiled(zoo, family, "base").emit("genai", tmp_path / "serve", eos_token_id=EOS)
    model, eager = GenaiModel(tmp_path / "serve"), generating(zoo.directory(family))
    for prompt in prompts():
        with torch.no_grad():
            made = eager.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                max_new_tokens=NEW,
                do_sample=False,
                eos_token_id=EOS,
                pad_token_id=0,
            )
        assert model.greedy([prompt], NEW)[0] == made[0, len(prompt) :].tolist()


def generating(directory: Path) -> Any:
    """The model of transformers itself."""
    from transformers import AutoModelForCausalLM

    module: nn.Module = AutoModelForCausalLM.from_pretrained(directory)
    assert without_cache(module)
    return module.eval()


@pytest.mark.slow
def test_float16(zoo: Zoo, tmp_path: Path) -> None:
    made = zoo.compiled("llama", [entry("lora", "llama")], dtype="float16")
    perturb(made.module)
    made.emit("genai", tmp_path / "serve", eos_token_id=EOS)
    names = {proof.name for proof in made.proofs}
    assert {"genai, greedy, one by one", "genai, greedy, in one batch"} <= names


@pytest.mark.slow
def test_what_a_cache_does_not_hold_is_refused_with_the_way_out(zoo: Zoo, tmp_path: Path) -> None:
    made = zoo.compiled("llama", [{**entry("p-tuning", "llama"), "positions": [0, 2, 4]}])
    with pytest.raises(RefusedError, match="a cache can hold them in front alone") as caught:
        made.emit("genai", tmp_path / "serve", adapters="live")
    assert "or without a cache: emit onnx: ONNX Runtime runs it" in str(caught.value)
    assert not any(tmp_path.iterdir())
