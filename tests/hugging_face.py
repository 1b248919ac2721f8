"""Small configurations of real Hugging Face classes, with dropout wherever the class has one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

VOCABULARY = 99


@dataclass(frozen=True)
class Model:
    """A configuration, by its class in transformers and its options, and the task its model is built for."""

    config: str
    task: str
    options: dict[str, Any]

    def build(self, **more: Any) -> nn.Module:
        """The model, its weights as transformers initialises them."""
        import transformers

        from adaptc.tracing.huggingface.tasks import tasks

        config = getattr(transformers, self.config)(**self.options | more)
        return getattr(transformers, tasks()[self.task]).from_config(config)


TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
DECODER: dict[str, Any] = TEXT | {
    "num_key_value_heads": 2,
    "attention_dropout": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HEADS: dict[str, Any] = {"head_dim": 8}
ENCODER_DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "activation_dropout": 0.1,
    "decoder_start_token_id": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WINDOW: dict[str, Any] = {"sliding_window": 4}
"""Shorter than the sequences of the tests, so that it matters."""
MODELS = {
    "llama": Model("LlamaConfig", "causal-lm", TEXT | {"num_key_value_heads": 2, "attention_dropout": 0.1}),
    "gpt2": Model(
        "GPT2Config",
        "causal-lm",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "bert": Model("BertConfig", "sequence-classification", TEXT | {"num_labels": 3}),
    "t5": Model(
        "T5Config",
        "seq2seq-lm",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "d_ff": 48,
            "d_kv": 8,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
    ),
    "qwen3": Model("Qwen3Config", "causal-lm", DECODER | HEADS),
    "mistral": Model("MistralConfig", "causal-lm", DECODER | WINDOW),
    "gemma2": Model("Gemma2Config", "causal-lm", DECODER | HEADS | WINDOW | {"query_pre_attn_scalar": 8}),
    "roberta": Model(
        "RobertaConfig",
        "sequence-classification",
        TEXT
        | {"num_labels": 3, "type_vocab_size": 1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    ),
    "bart": Model("BartConfig", "seq2seq-lm", ENCODER_DECODER | {"max_position_embeddings": 64}),
    "vit": Model(
        "ViTConfig",
        "image-classification",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 24,
            "patch_size": 8,
            "num_labels": 3,
            "hidden_dropout_prob": 0.1,
            "attention_probs_dropout_prob": 0.1,
        },
    ),
    "mixtral": Model(
        "MixtralConfig",
        "causal-lm",
        DECODER | {"num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.1},
    ),
    "whisper": Model(
        "WhisperConfig",
        "speech-seq2seq",
        ENCODER_DECODER | {"num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 40},
    ),
    "resnet": Model(
        "ResNetConfig",
        "image-classification",
        {
            "embedding_size": 8,
            "hidden_sizes": [8, 16],
            "depths": [1, 2],
            "layer_type": "basic",
            "num_labels": 5,
        },
    ),
}
"""Each family's class and sizes."""
