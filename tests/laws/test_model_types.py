"""The model types of transformers: what is compiled equals PyTorch, and the rest is refused in words."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

pytest.importorskip("peft")
from benchmarks.model_types import built, largest_error, model_types, outcomes, with_adaptc
from benchmarks.tiny import LAYERS, tiny_configurations

QUICK = ("electra", "mistral", "vit")
"""An encoder with its head, a decoder, and images."""
OPEN = ("resnet", "wav2vec2", "gpt_neo", "xlnet")
"""Images and waveforms of any size, a table that is cut to the length, and what the next call could use."""
SAMPLE = 12
"""One of so many types is run in the slow law."""


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in OPEN)])
def test_some_types_are_compiled_folded_and_exported_as_peft_computes(name: str, tmp_path: Path) -> None:
    model, task = built(name)
    model.save_pretrained(tmp_path / "base")
    assert with_adaptc(copy.deepcopy(model), task, tmp_path)[0] == "right"


def test_a_configuration_is_shrunk_with_its_parts() -> None:
    import transformers

    config = next(tiny_configurations(transformers.Qwen2VLConfig))
    text = config.get_text_config()
    assert text.num_hidden_layers == LAYERS
    assert config.vision_config.depth == LAYERS
    assert sum(text.rope_parameters["mrope_section"]) * 2 == text.hidden_size // text.num_attention_heads


def test_an_output_of_another_shape_is_no_small_error() -> None:
    import torch

    assert largest_error([torch.ones(2, 1)], [torch.ones(2, 2)]) == float("inf")
    assert largest_error([torch.ones(2)], [torch.ones(2) + 1e-3]) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("part", range(SAMPLE))
def test_a_sample_of_all_types_is_right_or_refused(part: int) -> None:
    results = list(outcomes(model_types()[part :: SAMPLE * SAMPLE]))
    assert results
    assert not [result for result in results if not result.holds]
