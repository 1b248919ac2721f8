"""A directory that onnxruntime-genai serves as it stands: its tokens are those of the model as PEFT merges it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import adaptc
from adaptc.cli.inspection import inspect, verify
from adaptc.compiler.artifacts.emit import emit_all
from adaptc.compiler.artifacts.greedy_proof import generated_again
from adaptc.compiler.driver import plan
from adaptc.emit.genai.tokenizer import copy_tokenizer
from adaptc.generation.genai import GenaiModel
from adaptc.ir.base import Pretrained
from adaptc.spec.spec import load
from tests.decoders import Decoder
from tests.families import Zoo, entry, marked, perturb, randomise
from tests.hugging_face import MODELS
from tests.served import EOS, PAD, Served, save_tokenizer

LENGTHS = (1, 3, 9, 20)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(5, 320, (length,), generator=generator).tolist() for length in LENGTHS]


def test_tokens_are_those_of_transformers(served: Served) -> None:
    merged, model = served.merged(), GenaiModel(served.directory)
    for prompt in prompts():
        with torch.no_grad():
            want = merged.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)
        assert model.greedy([prompt], 40) == [want[0, len(prompt) :].tolist()]


def test_a_ragged_batch_is_padded_behind(served: Served) -> None:
    model = GenaiModel(served.directory)
    assert model.greedy(prompts(), 12) == [model.greedy([prompt], 12)[0] for prompt in prompts()]


def test_the_directory_is_whole(served: Served) -> None:
    files = {path.name for path in served.directory.iterdir()}
    assert {
        "model.onnx",
        "model.onnx.data",
        "genai_config.json",
        "tokenizer.json",
        "chat_template.jinja",
    } <= files
    config = json.loads((served.directory / "genai_config.json").read_text())
    assert config["model"] | {"decoder": None} == {
        "type": "decoder",
        "vocab_size": 320,
        "context_length": 128,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": EOS,
        "decoder": None,
    }
    assert config["search"] == {
        "do_sample": True,
        "temperature": 0.75,
        "top_k": 20,
        "max_length": 128,
        "past_present_share_buffer": True,
    }


def test_what_it_cannot_do_is_told(served: Served) -> None:
    product = json.loads((served.directory / "manifest.json").read_text())["products"]["genai"]
    assert product["generation_left_out"] == {"min_p": 0.05}
    assert product["batches"] == "texts of any lengths"
    assert product["tokenizer"] is True
    assert served.notes == ("onnxruntime-genai has no min_p: 0.05, which the base generates with",)


def test_it_is_inspected_and_proved_again(served: Served) -> None:
    shown = {row["what"]: row["value"] for row in inspect(served.directory)}
    assert shown["genai: context length"] == 128
    rows = verify(served.directory)
    assert {path.name for path in served.directory.iterdir()} - {"manifest.json"} <= {
        row["what"] for row in rows
    }
    assert "onnxruntime-genai generates the same tokens, one by one, in one batch" in rows[-1]["checked"]


def test_other_tokens_are_found(served: Served, tmp_path: Path) -> None:
    """A directory whose program is as it was, and whose configuration makes the package feed it otherwise."""
    kept = json.loads((served.directory / "manifest.json").read_text())["products"]["genai"]["greedy"]
    for file in served.directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "genai_config.json").read_text())
    config["model"]["eos_token_id"] = kept["answers"][2][0]
    (tmp_path / "genai_config.json").write_text(json.dumps(config))
    with pytest.raises(adaptc.AdaptcError, match="onnxruntime-genai continues 17 tokens one by one with"):
        generated_again(kept, tmp_path)


def test_a_token_that_is_not_the_likeliest_fails_the_proof(served: Served, monkeypatch: Any) -> None:
    """The proof has teeth: one wrong token of 24 is found."""
    greedy = GenaiModel.greedy

    def wrong(self: GenaiModel, texts: Any, new: int, sound: Any) -> list[list[int]]:
        answers = greedy(self, texts, new, sound)
        answers[-1][-1] = (answers[-1][-1] + 1) % 320
        return answers

    monkeypatch.setattr(GenaiModel, "greedy", wrong)
    with pytest.raises(adaptc.AdaptcError, match="genai, greedy, one by one: token 8 behind 1 tokens is"):
        served.compiled.emit("genai", served.directory.parent / "wrong")


BY_HAND = {
    "inputs": {"input_ids": "int64[batch, seq]"},
    "adapt": [{"method": "lora", "target": "head", "r": 2}],
}


def by_hand(model: nn.Module, **spec: Any) -> adaptc.Compiled:
    return adaptc.compile(BY_HAND | spec, model=randomise(model).eval())


def test_a_decoder_written_by_hand(tmp_path: Path) -> None:
    compiled = by_hand(Decoder())
    with pytest.raises(adaptc.AdaptcError, match="how many tokens a text can have") as caught:
        compiled.emit("genai", tmp_path / "serve")
    assert "context_length: 2048" in str(caught.value)
    with pytest.raises(adaptc.AdaptcError, match="which token ends a text"):
        compiled.emit("genai", tmp_path / "serve", context_length=32)
    with pytest.raises(adaptc.AdaptcError, match="the model has the tokens 0 to 49"):
        compiled.emit("genai", tmp_path / "serve", context_length=32, eos_token_id=50)
    entry = {"format": "genai", "path": str(tmp_path / "serve"), "context_length": 32, "eos_token_id": 7}
    (artifact,) = emit_all(compiled.program, load({"emit": [entry]}).emit)
    assert artifact.notes == (
        "the base has no tokenizer, so that the directory takes token ids alone",
        "a batch may hold texts of one length: the model has no attention_mask, counts positions itself, or attends "
        "to a window that padding would fill",
    )
    ids = [3, 1, 4, 1, 5]
    answer = GenaiModel(tmp_path / "serve").greedy([ids], 10)[0]
    for token in answer:
        with torch.no_grad():
            assert int(compiled.fold()(torch.tensor([ids]))[0, -1].argmax()) == token
        ids.append(token)


class WithTypes(Decoder):
    def forward(self, input_ids: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids) + types[..., None]


class Hidden(Decoder):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(24, 24)


def test_other_inputs_and_hidden_values_are_refused(tmp_path: Path) -> None:
    with pytest.raises(adaptc.AdaptcError, match=r"nothing to types float32\[batch, seq\]") as caught:
        by_hand(WithTypes(), inputs=BY_HAND["inputs"] | {"types": "float32[batch, seq]"}).emit(
            "genai", tmp_path / "serve"
        )
    assert "emit onnx" in str(caught.value)
    with pytest.raises(adaptc.AdaptcError, match=r"needs logits .* and the model gives output \(") as caught:
        by_hand(Hidden()).emit("genai", tmp_path / "serve")
    assert "task: causal-lm" in str(caught.value)
    assert not any(tmp_path.iterdir())


def test_a_tokenizer_without_its_file_is_written_anew(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, LlamaConfig

    old, new = tmp_path / "old", tmp_path / "new"
    save_tokenizer(old)
    words = json.loads((old / "tokenizer.json").read_text())["model"]
    (old / "tokenizer.json").unlink()
    (old / "vocab.json").write_text(json.dumps(words["vocab"]))
    (old / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, words["merges"])]))
    stated = json.loads((old / "tokenizer_config.json").read_text())
    (old / "tokenizer_config.json").write_text(json.dumps(stated | {"tokenizer_class": "GPT2Tokenizer"}))
    assert copy_tokenizer(Pretrained(str(old), None, LlamaConfig(), False), new)
    assert (new / "tokenizer.json").is_file()
    text = "To be or not to be"
    assert AutoTokenizer.from_pretrained(new)(text) == AutoTokenizer.from_pretrained(old)(text)


def test_a_base_without_a_tokenizer(zoo: Zoo, tmp_path: Path) -> None:
    assert not copy_tokenizer(None, tmp_path)
    assert not copy_tokenizer(zoo.graph("llama").source.pretrained, tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()


REFUSED = {
    "bert": "needs logits (batch, tokens, vocabulary) of every token, and the model gives logits",
    "t5": "this one reads what an encoder makes of input_ids int64[batch, seq], attention_mask int64[batch, seq]",
    "bart": "this one reads what an encoder makes of input_ids",
    "whisper": "hears 3000 frames of sound",
    "vit": "serves decoders of tokens",
}


@pytest.mark.parametrize("name", marked(REFUSED, ("bert",)))
def test_a_family_that_is_not_served_is_refused_with_the_way_out(zoo: Zoo, name: str, tmp_path: Path) -> None:
    spec = {"base": zoo.base_of(name), "emit": [{"format": "genai", "path": str(tmp_path / "serve")}]}
    with pytest.raises(adaptc.AdaptcError, match=r"emit\.0\.format: onnxruntime-genai") as caught:
        plan(spec)
    assert REFUSED[name] in str(caught.value)
    assert "emit onnx" in str(caught.value)
    with pytest.raises(adaptc.AdaptcError, match="onnxruntime-genai"):
        zoo.compiled(name, [entry("lora", name)]).emit("genai", tmp_path / "serve")
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_a_program_that_counts_positions_itself(tmp_path: Path) -> None:
    """Rotary positions are inside the attention of heads of 16: they are no input of the program any more."""
    base: Any = randomise(MODELS["llama"].build(head_dim=16))
    base.save_pretrained(tmp_path / "base")
    spec = {"base": {"model": str(tmp_path / "base"), "task": "causal-lm"}}
    compiled = adaptc.compile({**spec, "adapt": [{"method": "lora", "target": "all-linear", "r": 4}]})
    perturb(compiled.module)
    compiled.emit("genai", tmp_path / "serve")
    settings = json.loads((tmp_path / "serve" / "genai_config.json").read_text())
    assert settings["search"]["past_present_share_buffer"] is True
    assert "position_ids" not in settings["model"]["decoder"]["inputs"]
    proved = {proof.name for proof in compiled.proofs}
    assert {"genai, greedy, one by one", "genai, greedy, in one batch"} <= proved
    assert any("computes what its graph did" in row["checked"] for row in verify(tmp_path / "serve"))
