"""A small classifier of reviews, its tokenizer, and what transformers says of a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

WORDS = (
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "good",
    "bad",
    "film",
    "a",
    "very",
    "dull",
    "warm",
    ".",
)


def save_tokenizer(directory: Path) -> None:
    """A tokenizer of whole words, with BERT's marks around a text and between two."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    numbers = {word: number for number, word in enumerate(WORDS)}
    words = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(directory)  # fmt: skip


def shares(directory: Path, text: str, pair: str | None = None) -> dict[str, float]:
    """What transformers says of a text: class -> probability."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    model: Any = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    with torch.no_grad():
        logits = model(**tokenizer(text, pair, return_tensors="pt")).logits[0]
    return {model.config.id2label[number]: float(share) for number, share in enumerate(logits.softmax(-1))}
