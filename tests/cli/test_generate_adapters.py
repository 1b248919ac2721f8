"""`adaptc generate --adapter`: one program, and the text of each adapter that it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import adaptc
from adaptc.cli.generate_command import generate
from adaptc.compiler.artifacts.deployed import make_adapter
from adaptc.emit.onnx.adapter_check import base_number
from adaptc.generation.genai import GenaiModel
from adaptc.generation.settings import Settings
from tests.command_line import run
from tests.families import Zoo, entry, perturb
from tests.served import Served, Swapped, save_tokenizer

pytestmark = pytest.mark.slow
NAMES = ("alice", "bob", None)
PROMPT, NEW = "To be or not", 16


def expected(swapped: Swapped, name: str | None, kind: str) -> str:
    """What transformers' model with the adapter in its weights writes, in the characters of who shows it."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(swapped.base)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        result = swapped.merged(name).generate(ids, max_new_tokens=NEW, do_sample=False)
    answer = result[0, ids.shape[1] :].tolist()
    if kind == "onnx":
        return tokenizer.decode(answer, skip_special_tokens=True)
    stream = GenaiModel(swapped.directory).tokenizer.create_stream()
    return "".join(stream.decode(token) for token in answer)


@pytest.mark.parametrize("kind", ["genai", "onnx"])
def test_each_adapter_has_its_own_text(swapped: Swapped, kind: str) -> None:
    path = swapped.directory if kind == "genai" else swapped.program
    texts: dict[str | None, str] = {}
    for name in (*NAMES, "alice"):
        words = () if name is None else ("--adapter", swapped.files[name])
        options = ("--prompt", PROMPT, "--raw", "--max-new-tokens", NEW, "--temperature", 0, "--json")
        ran = run("generate", path, *options, *words)
        assert ran.code == 0, ran.err
        texts[name] = ran.json["text"]
    assert texts == {name: expected(swapped, name, kind) for name in NAMES}
    assert len(set(texts.values())) == 3


def test_the_tokens_with_each_adapter_are_proved(swapped: Swapped) -> None:
    for who in ("genai", "genai, alice", "genai, bob", "genai, the base again"):
        assert {f"{who}, greedy, one by one", f"{who}, greedy, in one batch"} <= swapped.proofs


def test_one_more_adapter_is_made_for_a_directory(swapped: Swapped, tmp_path: Path) -> None:
    make_adapter(swapped.directory, swapped.adapters["bob"], tmp_path / "carol.onnx_adapter")
    model, texts = GenaiModel(swapped.directory), [[5, 6, 7]]
    want = model.adapted(swapped.files["bob"]).greedy(texts, 12)
    assert model.adapted(tmp_path / "carol.onnx_adapter").greedy(texts, 12) == want
    assert model.greedy(texts, 12) != want


@pytest.mark.parametrize("kind", ["genai", "onnx"])
def test_what_does_not_fit_is_refused(swapped: Swapped, served: Served, kind: str, tmp_path: Path) -> None:
    path = swapped.directory if kind == "genai" else swapped.program
    other = tmp_path / "other.onnx_adapter"
    rewritten(swapped.files["alice"], other, base=base_number("f" * 64))
    larger = tmp_path / "larger.onnx_adapter"
    rewritten(swapped.files["alice"], larger, more="model.layers.9.adapter_A")
    wrong = {
        other: "made for another base",
        larger: "has no place for model.layers.9.adapter_A 4x",
        tmp_path / "gone.onnx_adapter": "no such file",
        swapped.base / "config.json": "no adapter that ONNX Runtime reads",
    }
    for adapter, reason in wrong.items():
        ran = run("generate", path, "--prompt", "hi", "--adapter", adapter)
        assert ran.code == 1
        assert reason in ran.err
    folded = served.directory if kind == "genai" else served.program
    ran = run("generate", folded, "--prompt", "hi", "--adapter", swapped.files["alice"])
    assert ran.code == 1
    assert "takes no adapters" in ran.err
    assert "`adapters: swap`" in ran.err


def rewritten(source: Path, target: Path, base: int | None = None, more: str | None = None) -> None:
    """A copy of an adapter's file for another base, or with one more tensor."""
    import onnxruntime

    old = onnxruntime.AdapterFormat.read_adapter(str(source))
    tensors = dict(old.get_parameters())
    if more is not None:
        tensors[more] = next(value for name, value in tensors.items() if name.endswith("adapter_A"))
    new = onnxruntime.AdapterFormat()
    new.set_adapter_version(1)
    new.set_model_version(old.get_model_version() if base is None else base)
    new.set_parameters(tensors)
    new.export_adapter(str(target))


def test_a_decoder_beside_its_encoder(zoo: Zoo, tmp_path: Path) -> None:
    """The prompt goes to the encoder, and the answer begins with the token that the base says."""
    spec = {"base": zoo.base_of("t5"), "adapters": {"alice": [entry("lora", "t5")]}}
    compiled = adaptc.compile(spec)
    alternative = compiled.alternatives["alice"]
    perturb(alternative.module)
    program, file = tmp_path / "model.onnx", tmp_path / "alice.onnx_adapter"
    compiled.emit("onnx", program, adapters="swap", cache=True)
    compiled.emit("onnx-adapter", file, name="alice")
    named = tmp_path / "named"
    save_tokenizer(named, None)
    settings = ("--tokenizer", named, "--prompt", "ab", "--max-new-tokens", 8, "--temperature", 0, "--json")
    refused = run("generate", program, *settings)
    assert "nothing says which token begins an answer" in refused.err
    (named / "generation_config.json").write_text('{"decoder_start_token_id": 0, "eos_token_id": 1}')
    texts = [
        generate(program, "ab", Settings(8, temperature=0.0), False, (), str(named), lambda piece: None, a)
        for a in (None, file)
    ]
    modules = [compiled.module.eval(), alternative.module.eval()]
    assert [text["text"] for text in texts] == [answered(module, named, "ab", 8) for module in modules]
    assert texts[0]["text"] != texts[1]["text"]


def answered(module: Any, tokenizer: Path, prompt: str, new: int) -> str:
    """The likeliest tokens by the module without a cache."""
    from transformers import AutoTokenizer

    words: Any = AutoTokenizer.from_pretrained(tokenizer)
    source, ids = torch.tensor([words(prompt)["input_ids"]]), [0]
    while len(ids) <= new and ids[-1] != 1:
        with torch.no_grad():
            outputs = module(
                input_ids=source,
                attention_mask=torch.ones_like(source),
                decoder_input_ids=torch.tensor([ids]),
            )
        ids.append(int(outputs["logits"][0, -1].argmax()))
    return words.decode(ids[1:], skip_special_tokens=True)
