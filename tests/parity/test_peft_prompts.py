"""Virtual tokens against PEFT's own: its checkpoints read here, ours read there, outputs and losses the same."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import adaptc
from tests.families import Zoo, close, differs, inputs, outputs, perturb

TASKS = {
    **dict.fromkeys(("llama", "gpt2", "qwen3"), "CAUSAL_LM"),
    **dict.fromkeys(("bert", "roberta"), "SEQ_CLS"),
    **dict.fromkeys(("t5", "bart"), "SEQ_2_SEQ_LM"),
}
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "prefix": (peft.PrefixTuningConfig, {}),
    "projected": (peft.PrefixTuningConfig, {"prefix_projection": True, "encoder_hidden_size": 12}),
    "prompt": (peft.PromptTuningConfig, {}),
    "mlp": (peft.PromptEncoderConfig, {"encoder_hidden_size": 12}),
    "lstm": (
        peft.PromptEncoderConfig,
        {"encoder_hidden_size": 12, "encoder_reparameterization_type": "LSTM"},
    ),
}
OURS: dict[str, dict[str, Any]] = {
    "prefix": {"method": "prefix"},
    "projected": {"method": "prefix", "projection": True, "encoder_hidden_size": 12},
    "v2": {"method": "p-tuning-v2"},
    "prompt": {"method": "prompt"},
    "mlp": {"method": "p-tuning", "encoder_hidden_size": 12},
    "lstm": {"method": "p-tuning", "encoder_hidden_size": 12, "encoder_reparameterization_type": "LSTM"},
}
QUICK = {("prompt", "bert"), ("mlp", "llama")}
OURS_QUICK = {("prefix", "llama")}
CASES = [
    pytest.param(kind, name, marks=[pytest.mark.slow] * ((kind, name) not in QUICK))
    for kind in KINDS
    for name in TASKS
]
OURS_CASES = [
    pytest.param(kind, name, marks=[pytest.mark.slow] * ((kind, name) not in OURS_QUICK))
    for kind in OURS
    for name in ("llama", "bert", "t5")
]


def skip_where_peft_cannot(zoo: Zoo, kind: str, name: str) -> None:
    """PEFT looks for a classifier's cache, which a prefix goes into, by a name that transformers has changed."""
    if TASKS[name] != "SEQ_CLS" or kind not in ("prefix", "projected", "v2"):
        return
    model = zoo.fresh(name)
    modules = [model, getattr(model, model.base_model_prefix, model)]
    if not any("past_key_values" in inspect.signature(module.forward).parameters for module in modules):
        pytest.skip(f"this PEFT has no prefix tuning of {name} with this transformers")


def theirs(zoo: Zoo, kind: str, name: str) -> Any:
    """A model with PEFT's virtual tokens, drawn at random."""
    skip_where_peft_cannot(zoo, kind, name)
    cls, options = KINDS[kind]
    torch.manual_seed(1)
    return peft.get_peft_model(
        zoo.fresh(name), cls(task_type=TASKS[name], num_virtual_tokens=3, **options)
    ).eval()


def compare(got: dict[str, torch.Tensor], want: Any) -> None:
    """Every output; PEFT's logits hold the virtual tokens too, ours the real ones only."""
    for key, value in got.items():
        expected = want[key]
        close(value, expected[:, -value.shape[1] :] if value.dim() > 2 else expected)


def unplaced(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without positions, which PEFT takes from nobody where it puts tokens in front."""
    return {name: tensor for name, tensor in tensors.items() if name != "position_ids"}


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_theirs_are_read(zoo: Zoo, kind: str, name: str, tmp_path: Path) -> None:
    model = theirs(zoo, kind, name)
    model.save_pretrained(tmp_path)
    compiled = zoo.compiled(name, [{"adapter": str(tmp_path)}])
    for batch, length in ((2, 5), (1, 1), (3, 9)):
        tensors = unplaced(inputs(name, batch, length, pad=batch == 2))
        with torch.no_grad():
            want = model(**tensors)
            live = outputs(compiled.module.eval(), tensors, compiled.graph.outputs)
            folded = outputs(compiled.fold(), tensors, compiled.graph.outputs)
        compare(live, want)
        compare(folded, want)
        differs(live["logits"], zoo.run_eager(name, tensors)["logits"])


@pytest.mark.parametrize(("kind", "name"), OURS_CASES)
def test_ours_are_read_there(zoo: Zoo, kind: str, name: str, tmp_path: Path) -> None:
    entry: dict[str, Any] = {**OURS[kind], "num_virtual_tokens": 3}
    if name == "t5":
        entry["num_transformer_submodules"] = 2
    compiled = zoo.compiled(name, [entry])
    perturb(compiled.module, seed=2)
    compiled.save_adapter(tmp_path)
    heads = ["base_model.classifier.bias", "base_model.classifier.weight"] if name == "bert" else []
    assert sorted(load_file(tmp_path / "adapter_model.safetensors")) == [*heads, "prompt_embeddings"]
    assert zoo.compiled(name, [{"adapter": str(tmp_path)}]).graph.adapter_names == [
        "prompt_embeddings.default"
    ]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["task_type"] == TASKS[name]
    skip_where_peft_cannot(zoo, kind, name)
    model = peft.PeftModel.from_pretrained(zoo.fresh(name), str(tmp_path)).eval()
    tensors = unplaced(inputs(name, 2, 6, pad=True))
    with torch.no_grad():
        got, want = outputs(compiled.module.eval(), tensors, compiled.graph.outputs), model(**tensors)
    compare(got, want)


@pytest.mark.slow
def test_a_head_goes_with_them(zoo: Zoo, tmp_path: Path) -> None:
    """PEFT trains the classifier along, and saves it beside the tokens."""
    model = theirs(zoo, "prompt", "bert")
    perturb(model, seed=3)
    model.save_pretrained(tmp_path / "theirs")
    tensors = inputs("bert", 2, 5, pad=True)
    read = zoo.compiled("bert", [{"adapter": str(tmp_path / "theirs")}])
    with torch.no_grad():
        compare(outputs(read.module.eval(), tensors, read.graph.outputs), model(**tensors))
    ours = zoo.compiled(
        "bert",
        [{"method": "prompt", "num_virtual_tokens": 3}, {"method": "full", "target": "classifier"}],
    )
    perturb(ours.module, seed=4)
    ours.save_adapter(tmp_path / "ours")
    there = peft.PeftModel.from_pretrained(zoo.fresh("bert"), str(tmp_path / "ours")).eval()
    with torch.no_grad():
        compare(outputs(ours.module.eval(), tensors, ours.graph.outputs), there(**tensors))
    again = zoo.compiled("bert", [{"adapter": str(tmp_path / "ours")}])
    with torch.no_grad():
        one, other = (outputs(c.module.eval(), tensors, c.graph.outputs) for c in (ours, again))
    close(one["logits"], other["logits"])


def test_a_head_that_is_trained_under_another_name_is_not_written_untrained(zoo: Zoo, tmp_path: Path) -> None:
    """PEFT would take the untrained one without a word."""
    entries = [
        {"method": "prompt", "num_virtual_tokens": 3, "name": "words"},
        {"method": "full", "target": "classifier"},
    ]
    zoo.compiled("bert", entries).save_adapter(tmp_path)
    assert list(load_file(tmp_path / "words" / "adapter_model.safetensors")) == ["prompt_embeddings"]
    with pytest.raises(KeyError):
        peft.PeftModel.from_pretrained(zoo.fresh("bert"), str(tmp_path / "words"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param("prefix", marks=pytest.mark.slow), "prompt"])
def test_labels_line_up(zoo: Zoo, kind: str, tmp_path: Path) -> None:
    """The loss of a model that computes its own is PEFT's, and logits stand beside their tokens."""
    model = theirs(zoo, kind, "llama")
    model.save_pretrained(tmp_path)
    compiled = adaptc.compile(
        {
            "base": zoo.base_of("llama"),
            "inputs": dict.fromkeys(("input_ids", "attention_mask", "labels"), "int64[batch, seq]"),
            "adapt": [{"adapter": str(tmp_path)}],
        }
    )
    tensors = unplaced(inputs("llama", 3, 7, pad=True))
    tensors["labels"] = torch.where(tensors["attention_mask"] > 0, tensors["input_ids"], -100)
    with torch.no_grad():
        want, got = model(**tensors), compiled.module.eval()(**tensors)
    close(got["loss"], want["loss"])
    assert got["logits"].shape[:2] == tensors["labels"].shape
    compare({"logits": got["logits"]}, want)


@pytest.mark.slow
def test_words_to_start_from_are_theirs(zoo: Zoo, tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"[UNK]": 0, "good": 5, "or": 6, "bad": 7}, "[UNK]"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    model = zoo.fresh("bert")
    model.config.id2label = {0: "bad", 1: "good", 2: "good or bad"}
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base = {"model": str(tmp_path / "base"), "task": "sequence-classification"}

    def starts(**options: Any) -> torch.Tensor:
        compiled = adaptc.compile({"base": base, "adapt": [{"method": "prompt", **options}]})
        return compiled.graph.weights["prompt_embeddings.default"].load()

    config = peft.PromptTuningConfig(
        task_type="SEQ_CLS",
        num_virtual_tokens=5,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="good or bad",
        tokenizer_name_or_path=str(tmp_path / "base"),
    )
    want = peft.get_peft_model(zoo.fresh("bert"), config).prompt_encoder["default"].embedding.weight
    assert torch.equal(starts(init="TEXT", init_text="good or bad", num_virtual_tokens=5), want)
    table = model.get_input_embeddings().weight
    labels = starts(init="CLASS_LABELS", num_virtual_tokens=4)
    close(labels[:3], torch.stack([table[7], table[5], table[[5, 6, 7]].mean(0)]))
    assert (table == labels[3]).all(1).any()
    drawn = starts(init="SAMPLE_VOCAB", num_virtual_tokens=6)
    assert all((table == row).all(1).any() for row in drawn)
    given = starts(init="TEXT", init_tokens=[[9], [11, 12]], num_virtual_tokens=3)
    close(given, torch.stack([table[9], table[[11, 12]].mean(0), table[9]]))
