"""Small random models of real classes, with weights that are nowhere zero, and what to adapt in each."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adaptc.tracing.huggingface.tasks import tasks
from examples.own_model import build


@dataclass(frozen=True)
class Family:
    """One base: its configuration, its task, and what PEFT is told to adapt.

    `feedforward` are those of the targets that (IA)³ scales the input of, `parameters` what LoRA adapts beside the
    targets, in the words of PEFT's `target_parameters`.
    """

    config: Any
    task: str | None
    targets: tuple[str, ...]
    feedforward: tuple[str, ...]
    parameters: tuple[str, ...] = ()


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
CROSS_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
GATED = ("gate_proj", "up_proj", "down_proj")
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight")
NAMED = ("query", "key", "value", "intermediate.dense", "output.dense")


def families() -> dict[str, Family]:
    """The bases of the table, by name."""
    import transformers as t

    words: dict[str, Any] = {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    encoder: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    decoder = {**words, **encoder, "num_key_value_heads": 2, "attention_dropout": 0.1}
    both: dict[str, Any] = {
        "d_model": 64,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "decoder_start_token_id": 2,
    }
    both |= {f"{part}_attention_heads": 4 for part in ("encoder", "decoder")} | words
    both |= {f"{part}_ffn_dim": 96 for part in ("encoder", "decoder")} | {"max_position_embeddings": 64}
    t5: dict[str, Any] = {"d_model": 64, "d_ff": 96, "d_kv": 16, "num_layers": 2, "num_heads": 4}
    t5 |= {**words, "decoder_start_token_id": 0}
    window: dict[str, Any] = {"sliding_window": 4}
    heads: dict[str, Any] = {"head_dim": 16}
    experts: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.1}
    speech: dict[str, Any] = {"num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 40}
    stages: dict[str, Any] = {
        "embedding_size": 16,
        "hidden_sizes": [16, 32],
        "depths": [1, 2],
        "num_labels": 5,
    }
    labels: dict[str, Any] = {"num_labels": 5}
    vit = {**encoder, **labels, "image_size": 24, "patch_size": 8, "hidden_dropout_prob": 0.1}
    gpt2: dict[str, Any] = {**words, "n_embd": 64, "n_layer": 2, "n_head": 4}
    causal, classes, images = "causal-lm", "sequence-classification", "image-classification"
    own: dict[str, Any] = {"features": 24, "width": 64, "classes": 5}
    return {
        "Llama": Family(t.LlamaConfig(**decoder), causal, (*ATTENTION, *GATED), ("down_proj",)),
        "GPT-2": Family(t.GPT2Config(**gpt2), causal, ("c_attn", "c_fc"), ("c_fc",)),
        "BERT": Family(t.BertConfig(**words, **encoder), classes, NAMED, ("output.dense",)),
        "T5": Family(t.T5Config(**t5), "seq2seq-lm", ("q", "k", "v", "wi", "wo"), ("wo",)),
        "Qwen3": Family(t.Qwen3Config(**decoder, **heads), causal, (*ATTENTION, *GATED), ("down_proj",)),
        "Mistral": Family(t.MistralConfig(**decoder, **window), causal, (*ATTENTION, *GATED), ("down_proj",)),
        "Gemma2": Family(
            t.Gemma2Config(**decoder, **heads, **window), causal, (*ATTENTION, *GATED), ("down_proj",)
        ),
        "Mixtral": Family(t.MixtralConfig(**decoder, **experts), causal, ATTENTION, ("o_proj",), EXPERTS),
        "RoBERTa": Family(t.RobertaConfig(**words, **encoder, **labels), classes, NAMED, ("output.dense",)),
        "BART": Family(t.BartConfig(**both), "seq2seq-lm", (*CROSS_ATTENTION, "fc1", "fc2"), ("fc2",)),
        "Whisper": Family(
            t.WhisperConfig(**both, **speech), "speech-seq2seq", (*CROSS_ATTENTION, "fc1", "fc2"), ("fc2",)
        ),
        "ViT": Family(t.ViTConfig(**vit), images, (*ATTENTION, "fc1", "fc2"), ("fc2",)),
        "ResNet": Family(
            t.ResNetConfig(**stages, layer_type="basic"),
            images,
            ("convolution", "classifier.1"),
            ("classifier.1",),
        ),
        "own module": Family(own, None, ("up", "down", "stem"), ("down",)),
    }


def make(family: Family) -> tuple[Any, Path]:
    """A model, in evaluation mode, and the directory it is saved in."""
    import transformers

    torch.manual_seed(0)
    if family.task is None:
        model: Any = build(**family.config)
    else:
        model = getattr(transformers, tasks()[family.task]).from_config(family.config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.1)
            if "norm" in name.lower() or ".ln_" in name:
                parameter.add_(1.0)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.uniform_(0.5, 1.5)
    directory = Path(tempfile.mkdtemp(prefix="adaptc-base-"))
    if family.task is not None:
        model.save_pretrained(directory)
    return model.eval(), directory


def peft_model(model: Any, family: Family, method: str) -> Any:
    """The same model under PEFT, its adapter random and nowhere zero."""
    from peft import IA3Config, LoraConfig, get_peft_model

    targets, forward = list(family.targets), list(family.feedforward)
    if method == "ia3":
        config: Any = IA3Config(target_modules=targets, feedforward_modules=forward)
    else:
        parameters = list(family.parameters) if method == "lora" else None
        config = LoraConfig(
            r=4, lora_alpha=8, target_modules=targets, target_parameters=parameters, use_dora=method == "dora"
        )
    adapted = get_peft_model(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return adapted.eval()
