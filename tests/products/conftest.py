"""A small classifier of texts with a tokenizer, compiled into several products."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import adaptc
from tests.reviews import WORDS, save_tokenizer


@pytest.fixture(scope="session")
def reviewer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the classifier; its classes are `bad`, `good` and `neither`."""
    from transformers import BertConfig, BertForSequenceClassification

    directory = tmp_path_factory.mktemp("reviewer")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=24, initializer_range=0.5, id2label={0: "bad", 1: "good", 2: "neither"},
        label2id={"bad": 0, "good": 1, "neither": 2},
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(directory)
    save_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def build(reviewer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The products of the classifier, whose adapter is not trained: all compute what the classifier does."""
    folder = tmp_path_factory.mktemp("build")
    spec = {
        "base": {"model": str(reviewer), "task": "sequence-classification"},
        "adapt": [{"method": "lora", "target": "*.query", "r": 2}],
    }
    compiled = adaptc.compile(spec)
    compiled.emit("onnx", folder / "base.onnx", adapters="none")
    compiled.emit("onnx", folder / "folded.onnx")
    compiled.emit("torch", folder / "trainable")
    return folder
