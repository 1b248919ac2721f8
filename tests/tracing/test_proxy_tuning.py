"""Proxy-tuning: a large decoder steered by a small one, tuned and untuned, as one model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adaptc
from adaptc.emit.onnx.runtime import open_session, session_call
from tests.families import close, inputs, randomise
from tests.hugging_face import MODELS

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
ALPHA = 0.5


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """A large model and two small ones: name -> its directory, and itself."""
    root = tmp_path_factory.mktemp("proxy")
    made: dict[str, tuple[Path, Any]] = {}
    for seed, (name, options) in enumerate({"base": {}, "tuned": SMALL, "untuned": SMALL}.items()):
        model: Any = randomise(MODELS["llama"].build(**options), seed).eval()
        model.save_pretrained(root / name)
        made[name] = root / name, model
    return made


def spec(three: dict[str, tuple[Path, Any]], **proxy: object) -> dict[str, Any]:
    parts = {"tuned": str(three["tuned"][0]), "untuned": str(three["untuned"][0]), "alpha": ALPHA}
    return {"base": {"model": str(three["base"][0]), "task": "causal-lm", "proxy": parts | proxy}}


def by_hand(three: dict[str, tuple[Path, nn.Module]], given: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        base, tuned, untuned = (model(**given).logits for _, model in three.values())
    return base + ALPHA * (tuned - untuned)


@pytest.mark.slow
def test_the_logits_are_those_of_three_models_with_a_cache_too(three: Any) -> None:
    compiled = adaptc.compile(spec(three))
    assert set(three["base"][1].state_dict()) < set(compiled.module.state_dict())
    given = inputs("llama", 3, 6, pad=True)
    with torch.no_grad():
        close(compiled.module.eval()(**given)["logits"], by_hand(three, given))
    ids = given["input_ids"][:1]
    written = compiled.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
    for _ in range(4):
        positions = torch.arange(ids.shape[1])[None]
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}
        ids = torch.cat([ids, by_hand(three, given)[:, -1:].argmax(-1)], 1)
    assert torch.equal(written, ids)


@pytest.mark.slow
def test_adapters_and_onnx(three: Any, tmp_path: Path) -> None:
    lora = {"method": "lora", "r": 2, "target": "model.layers.*.q_proj"}
    compiled = adaptc.compile({**spec(three), "adapt": [lora]})
    assert {a.site.module for a in compiled.graph.adaptations} == {
        f"model.layers.{n}.self_attn.q_proj" for n in range(2)
    }
    compiled.emit("onnx", tmp_path / "m.onnx")
    given = inputs("llama", 3, 6)
    (got,) = session_call(open_session(tmp_path / "m.onnx"))(given)
    close(torch.as_tensor(got), by_hand(three, given))
    compiled.emit("onnx", tmp_path / "cached.onnx", cache=True)
    with pytest.raises(adaptc.RefusedError, match="parts of other checkpoints, tuned and untuned"):
        compiled.emit("hf", tmp_path / "hf")


def save_tokenizer(directory: Path, words: list[str]) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    model = WordLevel({word: number for number, word in enumerate(words)}, "[UNK]")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), unk_token="[UNK]").save_pretrained(directory)


def test_other_vocabularies_are_refused(three: Any, tmp_path: Path) -> None:
    larger = MODELS["llama"].build(**SMALL, vocab_size=101)
    larger.save_pretrained(tmp_path / "larger")  # type: ignore[operator]
    with pytest.raises(
        adaptc.SpecError,
        match=r"base\.proxy: the vocabularies differ: the base has 99 tokens, the tuned model 101",
    ):
        adaptc.compile(spec(three, tuned=str(tmp_path / "larger")))
    words = {
        "base": ["[UNK]", "is", "good"],
        "tuned": ["[UNK]", "good", "is"],
        "untuned": ["[UNK]", "is", "good"],
    }
    copies = {name: (tmp_path / name, model) for name, (_, model) in three.items()}
    for name, (path, model) in copies.items():
        model.save_pretrained(path)
        save_tokenizer(path, words[name])
    with pytest.raises(adaptc.SpecError, match="'is' is token 1 of the base, and 2 of the tuned model"):
        adaptc.compile(spec(copies))


def test_what_is_written_wrong_is_told(three: Any) -> None:
    with pytest.raises(adaptc.SpecError, match=r"base\.proxy\.untuned: .*nowhere: no such directory"):
        adaptc.compile(spec(three, untuned="./nowhere"))
    other = spec(three)
    other["base"]["task"] = "feature-extraction"
    with pytest.raises(adaptc.SpecError, match="only a 'model' of task causal-lm is proxy-tuned"):
        adaptc.compile(other)
