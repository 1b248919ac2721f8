"""Small random models of real classes, with weights that are nowhere zero, and what to adapt in each."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from examples.own_model import build


@dataclass(frozen=True)
class Family:
    """One base: how to make it, its task, the names PEFT is given, and which of them are feed-forward."""

    config: Any
    auto: str
    task: str | None
    targets: tuple[str, ...]
    feedforward: tuple[str, ...]


def families() -> dict[str, Family]:
    """The bases of the table, by name."""
    from transformers import BertConfig, GPT2Config, LlamaConfig, T5Config

    small: dict[str, Any] = {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    encoder: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    t5: dict[str, Any] = {"d_model": 64, "d_ff": 96, "d_kv": 16, "num_layers": 2, "num_heads": 4}
    t5 |= {**small, "decoder_start_token_id": 0}
    return {
        "Llama": Family(
            LlamaConfig(**small, **encoder, num_key_value_heads=2, attention_dropout=0.1),
            "AutoModelForCausalLM", "causal-lm",
            ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), ("down_proj",),
        ),
        "GPT-2": Family(
            GPT2Config(**small, n_embd=64, n_layer=2, n_head=4),
            "AutoModelForCausalLM", "causal-lm", ("c_attn", "c_fc"), ("c_fc",),
        ),
        "BERT": Family(
            BertConfig(**small, **encoder),
            "AutoModelForSequenceClassification", "sequence-classification",
            ("query", "key", "value", "intermediate.dense", "output.dense"), ("output.dense",),
        ),
        "T5": Family(
            T5Config(**t5),
            "AutoModelForSeq2SeqLM", "seq2seq-lm", ("q", "k", "v", "wi", "wo"), ("wo",),
        ),
        "own module": Family(
            {"features": 24, "width": 64, "classes": 5},
            "",
            None,
            ("up", "down", "stem"),
            ("down",),
        ),
    }  # fmt: skip


def make(family: Family) -> tuple[Any, Path]:
    """A model, in evaluation mode, and the directory it is saved in."""
    import transformers

    torch.manual_seed(0)
    own = family.task is None
    model: Any = (
        build(**family.config) if own else getattr(transformers, family.auto).from_config(family.config)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.1)
            if "norm" in name.lower() or ".ln_" in name:
                parameter.add_(1.0)
    directory = Path(tempfile.mkdtemp(prefix="adaptc-base-"))
    if not own:
        model.save_pretrained(directory)
    return model.eval(), directory


def peft_model(model: Any, family: Family, method: str) -> Any:
    """The same model under PEFT, its adapter random and nowhere zero."""
    from peft import IA3Config, LoraConfig, get_peft_model

    targets, forward = list(family.targets), list(family.feedforward)
    if method == "ia3":
        config: Any = IA3Config(target_modules=targets, feedforward_modules=forward)
    else:
        config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, use_dora=method == "dora")
    adapted = get_peft_model(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return adapted.eval()
