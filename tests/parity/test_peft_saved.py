"""What PEFT's checkpoints hold beside an adapter, and keys that are longer than PEFT's own."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import adaptc
from adaptc.errors import WeightError
from tests.families import close, differs, randomise
from tests.hugging_face import DECODER

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]
IDS = torch.arange(4, 18).reshape(2, 7)
INPUTS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
WORDS = DECODER["vocab_size"]
ALONG: dict[str, dict[str, Any]] = {
    "beside-it": {"target_modules": ["q_proj"]},
    "under-it": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "one-whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
}
QUICK = ("beside-it", "the adapter's name", "in front")


def quick(cases: dict[str, Any]) -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in cases]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**INPUTS)["logits"]


def model_at(base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base)


def base_at(directory: Path, words: int = WORDS, tied: bool = False) -> Path:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(**DECODER | {"vocab_size": words}, tie_word_embeddings=tied)
    model = randomise(Qwen2ForCausalLM(config))
    model.tie_weights()
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_at(tmp_path_factory.mktemp("base"))


def train(base: Path, adapter: Path, along: bool = False, **options: Any) -> torch.Tensor:
    """Save a PEFT adapter as if trained; gives its logits."""
    from peft import LoraConfig, get_peft_model

    peft: Any = get_peft_model(
        model_at(base), LoraConfig(r=4, lora_alpha=4, task_type="CAUSAL_LM", **options)
    )
    for parameter in peft.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    peft.save_pretrained(adapter, **({"save_embedding_layers": True} if along else {}))
    return logits(peft)


def compiled(base: Path, *adapters: Path, task: str = "causal-lm", **more: Any) -> adaptc.Compiled:
    entries = [
        {"adapter": str(adapter), **more, **({"name": f"a{n}"} if len(adapters) > 1 else {})}
        for n, adapter in enumerate(adapters)
    ]
    return adaptc.compile({"base": {"model": str(base), "task": task}, "adapt": entries})


@pytest.mark.parametrize("name", quick(ALONG))
def test_embeddings_saved_along(base: Path, name: str, tmp_path: Path) -> None:
    want = train(base, tmp_path / "a", along=True, **ALONG[name])
    ours = compiled(base, tmp_path / "a")
    close(logits(ours.module), want)
    ours.load_adapter(tmp_path / "a")
    close(logits(ours.module), want)
    ours.save_adapter(tmp_path / "again")
    close(logits(compiled(base, tmp_path / "again").module), want)


@pytest.mark.slow
def test_embeddings_that_differ_from_the_base_are_taken(base: Path, tmp_path: Path) -> None:
    """The adapter was trained on another embedding of the same size, which PEFT puts in place."""
    from peft import PeftModel

    other = base_at(tmp_path / "other")
    model = model_at(other)
    model.model.embed_tokens.weight.data += 0.1
    model.save_pretrained(other)
    want = train(other, tmp_path / "a", along=True, target_modules=["q_proj"])
    plain: Any = PeftModel.from_pretrained(model_at(base), tmp_path / "a")
    close(logits(plain), want)
    ours = compiled(base, tmp_path / "a")
    close(logits(ours.module), want)
    assert any("its own model.embed_tokens.weight, which differs" in note for note in ours.plan.notes)
    ours.emit("hf", tmp_path / "merged")
    close(logits(model_at(tmp_path / "merged")), want)


def test_a_grown_vocabulary(base: Path, tmp_path: Path) -> None:
    grown = base_at(tmp_path / "grown", WORDS + 6)
    want = train(grown, tmp_path / "a", along=True, **ALONG["whole"])
    close(logits(compiled(grown, tmp_path / "a").module), want)
    with pytest.raises(WeightError) as caught:
        compiled(base, tmp_path / "a")
    text = str(caught.value)
    assert f"is for a vocabulary of {WORDS + 6} words" in text
    assert f"of this base has {WORDS}" in text
    assert f"model.resize_token_embeddings({WORDS + 6})" in text


@pytest.mark.slow
def test_tied_tensors_that_are_both_whole(tmp_path: Path) -> None:
    base = base_at(tmp_path / "tied", tied=True)
    want = train(base, tmp_path / "a", **ALONG["whole"])
    ours = compiled(base, tmp_path / "a")
    close(logits(ours.module), want)
    ours.emit("hf", tmp_path / "merged")
    close(logits(model_at(tmp_path / "merged")), want)
    with pytest.raises(adaptc.AdaptcError, match=r"are kept live.*\n.*write `on_alias: untie`"):
        compiled(base, tmp_path / "a", on_alias="live").emit("hf", tmp_path / "live")


@pytest.mark.slow
def test_a_later_head_replaces_an_earlier_one(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    base = tmp_path / "base"
    config = BertConfig(vocab_size=64, type_vocab_size=1, **sizes)
    randomise(BertForSequenceClassification(config)).save_pretrained(base)
    model: Any = BertForSequenceClassification.from_pretrained(base)
    for name in ("one", "two"):
        peft: Any = get_peft_model(model, LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter) * 0.2)
        peft.save_pretrained(tmp_path / name)
        model = peft.merge_and_unload()
    ours = compiled(base, tmp_path / "one", tmp_path / "two", task="sequence-classification")
    close(logits(ours.module), logits(model))
    assert any("a later adapter holds classifier whole" in note for note in ours.plan.notes)
    ours.save_adapter(tmp_path / "both")
    again = compiled(base, tmp_path / "both", task="sequence-classification")
    close(logits(again.module), logits(model))


LENGTHENED = {
    "the adapter's name": (r"(lora_[AB])", r"\1.default", "the adapter's name 'default'"),
    "torch.compile": ("model.model.", "model._orig_mod.model.", "'_orig_mod'"),
    "FSDP": ("layers.0.", "layers.0._fsdp_wrapped_module.", "'_fsdp_wrapped_module'"),
    "checkpointing": ("layers.0.", "layers.0._checkpoint_wrapped_module.", "'_checkpoint_wrapped_module'"),
    "DDP": ("model.model.", "model.model.module.", "'module'"),
    "in front": ("base_model.", "module.base_model.", "'module'"),
}


def changed(adapter: Path, made: Path, old: str, new: str) -> Path:
    from safetensors.torch import load_file, save_file

    shutil.copytree(adapter, made)
    tensors = load_file(made / "adapter_model.safetensors")
    renamed = {re.sub(old, new, key, count=1): value for key, value in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, made / "adapter_model.safetensors")
    return made


@pytest.mark.parametrize("name", quick(LENGTHENED))
def test_lengthened_keys(base: Path, name: str, tmp_path: Path) -> None:
    old, new, told = LENGTHENED[name]
    want = train(base, tmp_path / "a", target_modules=["q_proj"], modules_to_save=["input_layernorm"])
    ours = compiled(base, changed(tmp_path / "a", tmp_path / "b", old, new))
    close(logits(ours.module), want)
    differs(logits(model_at(base)), want)
    assert any(told in note for note in ours.plan.notes)


def test_empty_tensors_are_told_as_distributed(base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    train(base, tmp_path / "a", target_modules=["q_proj"])
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file({key: torch.zeros(0) for key in load_file(file)}, file)
    with pytest.raises(WeightError) as caught:
        compiled(base, tmp_path / "a")
    assert "has shape [0] instead of" in str(caught.value)
    assert "DeepSpeed ZeRO-3 or FSDP" in str(caught.value)
