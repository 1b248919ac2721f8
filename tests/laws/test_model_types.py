"""The model types of transformers: what is compiled equals PyTorch, and the rest is refused in words."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import PretrainedConfig, PreTrainedModel

from adaptc.compiler.base import make_base
from adaptc.errors import TraceError
from adaptc.spec.spec import load
from adaptc.tracing.computed_buffers import compute_buffers

pytest.importorskip("peft")
from benchmarks.model_types import built, largest_error, model_types, outcomes, with_adaptc
from benchmarks.tiny import HEAD, LAYERS, tiny_configurations

QUICK = ("vit",)
"""Images, exported whole; text is what most other tests are of."""
OPEN = ("electra", "mistral", "resnet", "wav2vec2", "gpt_neo", "xlnet")
"""Text as an encoder and a decoder; sizes that are open, a table cut to the length, what the next call could use."""
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
    assert (text.num_hidden_layers, config.vision_config.depth) == (LAYERS, LAYERS)
    assert text.hidden_size // text.num_attention_heads >= HEAD


def test_an_output_of_another_shape_is_no_small_error() -> None:
    assert largest_error([torch.ones(2, 1)], [torch.ones(2, 2)]) == float("inf")
    assert largest_error([torch.ones(2)], [torch.ones(2) + 1e-3]) > 1e-4
    assert largest_error([torch.tensor([1.0, float("nan")])], [torch.tensor([1.0, 0.0])]) == float("inf")


@pytest.mark.parametrize(
    "name",
    [
        "siglip",
        "modernbert",
        pytest.param("falcon_h1", marks=pytest.mark.slow),
        pytest.param("kimi_k25", marks=pytest.mark.slow),
    ],
)
def test_buffers_that_no_checkpoint_holds_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    model, task = built(name)
    model.save_pretrained(tmp_path)
    base = make_base(load({"base": {"model": str(tmp_path), "task": task}}))
    assert base.model is not None
    ours, stored = dict(base.model.named_buffers()), model.state_dict()
    wanted = {key: value for key, value in model.named_buffers() if key not in stored}
    assert wanted
    assert [key for key, value in wanted.items() if not torch.equal(ours[key], value)] == []


class Partial(PreTrainedModel):
    """A model whose class does not compute one of its buffers."""

    config_class = PretrainedConfig

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.register_buffer("scale", torch.tensor([2.0, 3.0]), persistent=False)


def test_a_buffer_that_nothing_computes_is_an_error() -> None:
    with pytest.raises(
        TraceError, match=r"Partial\.scale is in no checkpoint.*does not compute(.|\n)*hand in"
    ):
        compute_buffers(Partial(PretrainedConfig()))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(SAMPLE))
def test_a_sample_of_all_types_is_right_or_refused(part: int) -> None:
    results = list(outcomes(model_types()[part :: SAMPLE * SAMPLE]))
    assert results
    assert not [result for result in results if not result.holds]
