"""Shared fixtures: one zoo of tiny random models a worker, traced once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from tests.families import Zoo
from tests.served import Served, save_served
from tests.spec_bases import save_bert, save_peft_adapter

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zoo]:
    root: Path = tmp_path_factory.mktemp("zoo")
    made = Zoo(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "adaptc.compiler.trainable.export", made.export
        )  # each base is traced in training mode once
        yield made


@pytest.fixture(scope="session")
def spec_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small BERT that stands for MiniLM in the specs of `specs/`."""
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def spec_adapter(spec_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of PEFT's for it."""
    return save_peft_adapter(spec_bert, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """A small Llama with an adapter, compiled for onnxruntime-genai and for ONNX Runtime."""
    return save_served(tmp_path_factory.mktemp("served"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
