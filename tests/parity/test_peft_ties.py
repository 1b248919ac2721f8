"""PEFT's `ensure_weight_tying`: what changes an embedding changes the head that is tied to it, and is saved so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import adaptc
from adaptc.errors import WeightError
from tests.families import close, differs, randomise
from tests.hugging_face import DECODER

TIED: dict[str, dict[str, Any]] = {
    "lora-on-the-embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "lora-on-the-head": {"target_modules": ["q_proj", "lm_head"]},
    "lora-on-both": {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
    "lora-by-a-regex": {"target_modules": ".*(embed_tokens|q_proj)"},
    "the-embedding-whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "the-head-whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "both-whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
}
QUICK = ("lora-on-the-embedding", "the-embedding-whole")
CASES = [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in TIED]
pytestmark = [
    # PEFT makes the tensors of the head from those of the embedding, and warns that they are not in the file
    pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]
IDS = torch.arange(4, 18).reshape(2, 7)
INPUTS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose head is its embedding."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(**DECODER, tie_word_embeddings=True)
    model = randomise(Qwen2ForCausalLM(config))
    model.tie_weights()
    directory = tmp_path_factory.mktemp("tied")
    model.save_pretrained(directory)
    return directory


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**INPUTS)["logits"]


def of_peft(base: Path, adapter: Path) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter))


def train(base: Path, adapter: Path, **options: Any) -> torch.Tensor:
    """Save a PEFT adapter as if trained; gives its logits."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    peft: Any = get_peft_model(model, LoraConfig(r=4, lora_alpha=4, task_type="CAUSAL_LM", **options))
    for parameter in peft.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    peft.save_pretrained(adapter)
    want = of_peft(base, adapter)
    close(logits(peft), want)
    return want


def compiled(base: Path, adapter: Path, **more: Any) -> Any:
    spec = {
        "base": {"model": str(base), "task": "causal-lm"},
        "adapt": [{"adapter": str(adapter), **more}],
    }
    return adaptc.compile(spec)


@pytest.mark.parametrize("name", CASES)
def test_tied_tensors_change_together(base: Path, name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    want = train(base, tmp_path / "adapter", ensure_weight_tying=True, **TIED[name])
    ours = compiled(base, tmp_path / "adapter")
    close(logits(ours.module), want)
    ours.emit("hf", tmp_path / "merged")
    close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), want)
    ours.save_adapter(tmp_path / "saved")
    close(of_peft(base, tmp_path / "saved"), want)
    close(logits(compiled(base, tmp_path / "saved").module), want)


def test_without_the_flag_only_one_of_them_changes(base: Path, tmp_path: Path) -> None:
    options = TIED["the-embedding-whole"]
    want = train(base, tmp_path / "adapter", **options)
    close(logits(compiled(base, tmp_path / "adapter").module), want)
    differs(logits(compiled(base, tmp_path / "adapter", on_alias="share").module), want)


def test_a_checkpoint_of_tied_tensors_says_what_untying_would_do(base: Path, tmp_path: Path) -> None:
    train(base, tmp_path / "adapter", ensure_weight_tying=True, **TIED["the-embedding-whole"])
    with pytest.raises(WeightError) as caught:
        compiled(base, tmp_path / "adapter", on_alias="untie")
    text = str(caught.value)
    assert "adapt.0.adapter" in text
    assert "trained with ensure_weight_tying, so that lm_head and model.embed_tokens change together" in text
    assert "write on_alias: share, or leave it out" in text


@pytest.mark.parametrize("method", ["lora", "ia3", "full"])
def test_shared_changes_are_saved_as_such(base: Path, method: str, tmp_path: Path) -> None:
    """Where PEFT has no word for it, the checkpoint is in adaptc's own format."""
    target = "model.embed_tokens" if method != "ia3" else "lm_head"
    entry = {"method": method, "target": target, "on_alias": "share"}
    first = adaptc.compile({"base": {"model": str(base), "task": "causal-lm"}, "adapt": [entry]})
    for parameter in first.module.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    want = logits(first.module)
    first.save_adapter(tmp_path / "saved")
    close(logits(compiled(base, tmp_path / "saved").module), want)
    if method == "lora":
        close(of_peft(base, tmp_path / "saved"), want)
