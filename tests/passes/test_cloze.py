"""Cloze prompting: the words of a class at the mask of a template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import adaptc
from tests.families import close, randomise

WORDS = ["[UNK]", "[MASK]", "[PAD]", "a", "fine", "dull", "film", "good", "great", "bad", "It", "was", "."]


def save(directory: Path, mask: str | None = "[MASK]") -> tuple[Path, Any]:
    """A small masked language model with a tokenizer of whole words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = randomise(BertForMaskedLM(BertConfig(vocab_size=len(WORDS), max_position_embeddings=40, **sizes)))
    model.tie_weights()  # type: ignore[operator]
    model.save_pretrained(directory)  # type: ignore[operator]
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, "[UNK]"))
    words.pre_tokenizer = Whitespace()
    special: dict[str, Any] = {"unk_token": "[UNK]", "pad_token": "[PAD]", "mask_token": mask}
    given = ["input_ids", "attention_mask"]
    PreTrainedTokenizerFast(
        tokenizer_object=words, model_input_names=given, model_max_length=12, **special
    ).save_pretrained(directory)
    return directory, model.eval()


def compiled(path: Path, **options: Any) -> adaptc.Compiled:
    cloze = {"method": "cloze", "verbalizer": {"negative": ["bad"], "positive": ["good", "great"]}, **options}
    lora = {"method": "lora", "r": 2, "target": "*.query", "name": "lora"}
    return adaptc.compile({"base": {"model": str(path), "task": "masked-lm"}, "adapt": [cloze, lora]})


def test_a_class_is_what_its_words_get_at_the_mask(tmp_path: Path) -> None:
    path, model = save(tmp_path)
    made = compiled(path)
    given = made.filled(["a fine film", {"text": "dull"}])
    assert given["input_ids"].tolist() == [[3, 4, 6, 10, 11, 1, 12], [5, 10, 11, 1, 12, 2, 2]]
    with torch.no_grad():
        z = model(**given).logits
        at_mask = torch.stack([z[0, 5], z[1, 3]])
        want = torch.stack([at_mask[:, 9], at_mask[:, 7:9].mean(1)], 1)
        close(made.module.eval()(**given)["logits"], want)
    assert {n for n, p in made.module.named_parameters() if p.requires_grad} == set(made.graph.adapter_names)
    assert any("cloze_bias" in name for name in made.graph.adapter_names)
    with pytest.raises(adaptc.AdaptcError, match=r"the template .* has the slot 'text', and a row has other"):
        made.filled([{"other": "a"}])
    with pytest.raises(adaptc.AdaptcError, match="row 1 is longer than the model reads"):
        made.filled(["a", "film " * 20])


def test_what_a_cloze_lacks_is_told(tmp_path: Path) -> None:
    path, _ = save(tmp_path / "whole")
    with pytest.raises(adaptc.SpecError, match="'terrible' is no single token of the model"):
        compiled(path, verbalizer={"negative": ["terrible"], "positive": ["good"]})
    with pytest.raises(adaptc.SpecError, match=r"a template has one \{mask\}, got 'so'"):
        compiled(path, template="so")
    with pytest.raises(adaptc.SpecError, match="it names the words of each class"):
        compiled(path, verbalizer={})
    with pytest.raises(adaptc.SpecError, match="the model has 13 words, and none with the number 99"):
        compiled(path, label_tokens=[[99]], mask_token=1)
    without, _ = save(tmp_path / "without", mask=None)
    with pytest.raises(adaptc.SpecError, match="this tokenizer has no mask token"):
        compiled(without)
