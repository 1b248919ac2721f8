"""The first spec of a model: a task that loads, and the inputs as comments."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from adaptc.cli.starter import starter_spec
from adaptc.compiler.base import make_base
from adaptc.errors import SpecError, TraceError
from adaptc.spec.spec import load
from adaptc.tracing.huggingface.inputs import derive_inputs
from adaptc.tracing.huggingface.tasks import model_classes, task_of, tasks
from tests.hugging_face import ENCODER_DECODER, MODELS, TEXT, Model

TINY_CLIP = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
OTHERS = {
    "tagger": Model("ElectraConfig", "token-classification", TEXT | {"embedding_size": 16}),
    "answers": Model(
        "DistilBertConfig", "question-answering", {"dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 48}
    ),
    "masked": Model("DebertaV2Config", "masked-lm", TEXT),
    "encoder": Model("T5Config", "text-encoding", MODELS["t5"].options),
    "decoder that classifies": Model("GPT2Config", "sequence-classification", MODELS["gpt2"].options),
    "denoiser": Model("MBartConfig", "seq2seq-lm", ENCODER_DECODER | {"max_position_embeddings": 64}),
    "segments": Model(
        "SegformerConfig",
        "semantic-segmentation",
        {
            "hidden_sizes": [8, 8, 8, 8],
            "depths": [1] * 4,
            "num_attention_heads": [1] * 4,
            "decoder_hidden_size": 8,
        },
    ),
    "pre-trained": Model("BertConfig", "pre-training", TEXT),
}


def write_model(model: Model, path: Path, **more: Any) -> Path:
    """A directory with the configuration of a model, and without its weights."""
    built: Any = model.build()
    built.config.architectures = [type(built).__name__]
    built.config.save_pretrained(path)
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | more))
    return path


@pytest.mark.parametrize("model", [*MODELS.values(), *OTHERS.values()], ids=[*MODELS, *OTHERS])
def test_the_first_spec_loads_the_class_that_was_saved(model: Model, tmp_path: Path) -> None:
    saved = json.loads((write_model(model, tmp_path) / "config.json").read_text())["architectures"]
    text = starter_spec(tmp_path, None, tmp_path).text
    (tmp_path / "spec.yaml").write_text(text)
    base = make_base(load(tmp_path / "spec.yaml"))
    assert [type(base.model).__name__] == saved
    assert {spec.name: str(spec) for spec in base.inputs} == yaml.safe_load(uncommented(text))["inputs"]
    for name, stand_in in base.left_out.items():
        assert f"# no input: {name}; in its place: {stand_in}\n" in text


def uncommented(text: str) -> str:
    """The first spec with its inputs written out."""
    return re.sub(r"^# (inputs:|  \w+: \w+\[)", r"\1", text, flags=re.MULTILINE)


def test_the_inputs_that_the_first_spec_lists_can_be_chosen_from(tmp_path: Path) -> None:
    write_model(MODELS["bert"], tmp_path)
    text = uncommented(starter_spec(tmp_path, None, tmp_path).text)
    taken = text.replace("  token_type_ids: int64[batch, seq]", "  position_ids: int64[batch, seq]")
    (tmp_path / "spec.yaml").write_text(taken)
    base = make_base(load(tmp_path / "spec.yaml"))
    assert [spec.name for spec in base.inputs] == ["input_ids", "attention_mask", "position_ids"]
    assert dict(base.left_out) == {"token_type_ids": "zeros"}


def test_a_class_that_no_task_makes_is_loaded_without_its_head(tmp_path: Path) -> None:
    write_model(MODELS["gpt2"], tmp_path, architectures=["GPT2DoubleHeadsModel"])
    assert "task: feature-extraction " in starter_spec(tmp_path, None, tmp_path).text


def test_inputs_that_cannot_be_derived_are_asked_for(tmp_path: Path) -> None:
    sizes = {"d_model": 16, "d_latents": 16, "num_latents": 4, "num_blocks": 1, "vocab_size": 32}
    write_model(Model("PerceiverConfig", "masked-lm", sizes), tmp_path)
    text = starter_spec(tmp_path, None, tmp_path).text
    assert "task: masked-lm " in text
    assert "# inputs: must be written: the inputs of PerceiverForMaskedLM cannot be derived" in text


@pytest.mark.parametrize("text", ['{"model_type": "no-such-model"}', '{"hidden_size": 4}', "[1]"])
def test_a_configuration_that_transformers_cannot_read_is_an_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(SpecError, match="its configuration cannot be read: "):
        starter_spec(tmp_path, None, tmp_path)


@pytest.mark.parametrize(
    ("adapter", "task"),
    [
        ({"task_type": "TOKEN_CLS"}, "token-classification"),
        ({"task_type": "QUESTION_ANS"}, "question-answering"),
        ({"task_type": "CAUSAL_LM"}, "masked-lm"),
        ({"auto_mapping": {"base_model_class": "BertForSequenceClassification"}}, "sequence-classification"),
    ],
)
def test_an_adapter_says_the_head_that_it_was_trained_with(
    adapter: dict[str, Any], task: str, tmp_path: Path
) -> None:
    write_model(Model("BertConfig", "masked-lm", TEXT), tmp_path / "model")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))
    assert f"task: {task} " in starter_spec(tmp_path / "model", tmp_path / "adapter", tmp_path).text


@pytest.mark.slow
def test_every_class_of_transformers_gets_a_task_that_makes_it() -> None:
    """For each class that an Auto class makes; and its inputs are derived, or the error says what to write."""
    import transformers
    from transformers.models.auto.auto_factory import _get_model_class
    from transformers.utils import DummyObject

    configs = {config for auto in tasks().values() for config in getattr(transformers, auto)._model_mapping}
    made = 0
    for config_class in sorted(configs, key=lambda cls: cls.__name__):
        try:
            config = config_class()
            models = {model for task in tasks() for model in model_classes(task, config)}
        except Exception:  # parts of it have no default, or need a package that is not installed
            continue
        config.dtype = torch.float32
        for model in (model for model in models if not isinstance(model, DummyObject)):
            task = task_of(config, model.__name__)
            config.architectures = [model.__name__]
            assert _get_model_class(config, getattr(transformers, tasks()[task])._model_mapping) is model
            with suppress(TraceError):  # it asks for them
                assert derive_inputs(model, config).inputs
            made += 1
    assert made > 1000
