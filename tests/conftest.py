"""Shared fixtures: one zoo of tiny random models a worker; each model is traced once."""

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
from tests.served import Served, Swapped, save_served, save_swapped
from tests.spec_bases import save_bert, save_peft_adapter
from tests.traces import Traces

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def traces() -> Traces:
    return Traces()


@pytest.fixture(scope="session", autouse=True)
def _traced_once(traces: Traces) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("adaptc.tracing.trace.export", traces.export)
        patch.setattr("adaptc.compiler.trainable.export", traces.export)
        patch.setattr("adaptc.compiler.program.base_of_both_modes", traces.base_of_both_modes)
        yield


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory, traces: Traces) -> Zoo:
    return Zoo(tmp_path_factory.mktemp("zoo"), traces)


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


@pytest.fixture(scope="session")
def swapped(tmp_path_factory: pytest.TempPathFactory) -> Swapped:
    """A small Llama with two adapters that are swapped, compiled for onnxruntime-genai and for ONNX Runtime."""
    return save_swapped(tmp_path_factory.mktemp("swapped"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
