"""Small models in place of those that the specs in specs/ name, so that every spec compiles as it stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
SPECS = sorted(ROOT.glob("specs/*.yaml"))


def save_bert(directory: Path, layers: int = 2) -> Path:
    """A small BERT with a tokenizer, in place of MiniLM; its weights are the same numbers on every machine."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    small: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "num_hidden_layers": layers,
    }
    model = BertModel(BertConfig(vocab_size=3000, **small))
    _fill(dict(model.named_parameters()))
    model.save_pretrained(directory)
    words = Tokenizer(WordLevel({"[UNK]": 0, "is": 1, "this": 2, "review": 3, "positive": 4}, "[UNK]"))
    words.pre_tokenizer = Whitespace()
    given = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", model_input_names=given)
    tokenizer.save_pretrained(directory)
    return directory


def save_peft_adapter(bert: Path, directory: Path) -> Path:
    """A PEFT checkpoint of LoRA on the small BERT, as if trained."""
    from peft import LoraConfig, get_peft_model
    from transformers import BertModel

    model = get_peft_model(BertModel.from_pretrained(bert), LoraConfig(r=2, target_modules=["query"]))
    _fill({name: parameter for name, parameter in model.named_parameters() if "lora" in name})
    model.save_pretrained(str(directory))
    return directory


def overrides_for(spec: Path, bert: Path, adapter: Path) -> list[str]:
    """The `--set` settings that put the small models in place of what a spec names."""
    text = spec.read_text()
    overrides: list[str] = []
    if "all-MiniLM" in text:
        overrides.append(f"base.model={bert}")
    if "my-peft-adapter" in text:
        overrides.append(f"adapt.0.adapter={adapter}")
    if spec.stem == "qalora":
        overrides.append("adapt.0.r=2")  # the small base has no more groups
    return overrides


def _fill(parameters: dict[str, torch.nn.Parameter]) -> None:
    """Uniform numbers between powers of two: whole multiples of 2^-26, which no machine rounds."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) / 2 - 0.25)
