"""A Hugging Face model that is handed in is treated as its directory is, and is the caller's own afterwards."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import adaptc
from adaptc.compiler.base import make_base
from adaptc.spec.spec import load
from tests.families import HUGGING_FACE, Zoo, close, inputs, outputs, randomise, without_cache
from tests.hugging_face import ENCODER_DECODER, MODELS, TEXT, Model

DROPPED = Model(
    "BartConfig",
    "seq2seq-lm",
    ENCODER_DECODER | {"max_position_embeddings": 64, "encoder_layerdrop": 0.5, "decoder_layerdrop": 0.5},
)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_in_memory_has_the_inputs_of_its_directory(name: str, tmp_path: Path) -> None:
    model: Any = MODELS[name].build()
    model.save_pretrained(tmp_path)
    stored = make_base(load({"base": {"model": str(tmp_path), "task": MODELS[name].task}}))
    held = make_base(load({}), model=model)
    assert held.inputs == stored.inputs
    assert held.left_out == stored.left_out
    assert held.heads == stored.heads
    assert held.notes == stored.notes


def test_a_model_that_was_loaded_has_the_inputs_that_its_tokenizer_gives(tmp_path: Path) -> None:
    import transformers

    MODELS["bert"].build().save_pretrained(tmp_path)  # type: ignore[operator]
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]")
    names = ["input_ids", "attention_mask"]
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"), model_input_names=names)
    tokenizer.save_pretrained(tmp_path)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert [spec.name for spec in make_base(load({}), model=model).inputs] == names


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", pytest.param("t5", marks=pytest.mark.slow)])
def test_a_model_with_a_cache_is_compiled_as_it_is(name: str, zoo: Zoo) -> None:
    model: Any = zoo.fresh(name)
    before = copy.deepcopy(model.config.to_dict())
    modules, tensors = dict(model.named_modules()), dict(model.named_parameters())
    compiled = adaptc.compile({"adapt": [{"method": "lora", "target": "all-linear", "r": 2}]}, model=model)
    given = inputs(name, 2, 5, pad=True)
    with torch.no_grad():
        want = outputs(model, given, ["logits"], **without_cache(model))["logits"]
        close(compiled.module.eval()(**given)["logits"], want, 8)
    assert model.config.to_dict() == before
    assert dict(model.named_modules()) == modules
    assert all(tensor is tensors[key] for key, tensor in model.named_parameters())
    held = dict(compiled.base.source.model.named_parameters())  # type: ignore[union-attr]
    assert all(held[key] is tensor for key, tensor in tensors.items())
    assert model(**given).past_key_values is not None


def test_a_model_with_a_cache_is_compiled_with_examples() -> None:
    model: Any = MODELS["llama"].build()
    ids = torch.zeros(2, 5, dtype=torch.long)
    compiled = adaptc.compile(
        {"adapt": [{"method": "lora", "target": "*.q_proj", "r": 2}]},
        model=model,
        example_inputs={"input_ids": ids},
    )
    assert compiled.base.outputs == ("logits",)
    assert compiled.plan.left_out["attention_mask"] == "ones"


def test_what_a_graph_cannot_follow_is_set_in_the_copy_alone() -> None:
    model: Any = randomise(DROPPED.build())
    base = make_base(load({}), model=model)
    assert "encoder_layerdrop is set to 0.0: a graph has a fixed number of layers" in base.notes
    assert base.model is not None
    assert {m.layerdrop for m in base.model.modules() if hasattr(m, "layerdrop")} == {0.0}
    assert {m.layerdrop for m in model.modules() if hasattr(m, "layerdrop")} == {0.5}
    assert model.config.encoder_layerdrop == 0.5


def test_a_peft_model_is_set_too() -> None:
    peft = pytest.importorskip("peft")
    model: Any = peft.get_peft_model(MODELS["llama"].build(), peft.LoraConfig(target_modules=["q_proj"]))
    base = make_base(load({}), model=model)
    assert [spec.name for spec in base.inputs] == ["input_ids", "attention_mask", "position_ids"]
    assert model.config.use_cache
    assert base.model is not None
    assert not base.model.config.use_cache  # type: ignore[union-attr]


def test_any_other_module_is_asked_for_its_inputs() -> None:
    with pytest.raises(adaptc.AdaptcError, match="a model needs example_inputs"):
        adaptc.compile({}, model=torch.nn.Linear(2, 2))


def test_the_families_are_those_of_the_laws() -> None:
    assert set(HUGGING_FACE) == set(MODELS)
    assert TEXT["vocab_size"] == 99
