"""genai_config.json: what onnxruntime-genai reads of a program, and how it generates unless a caller says otherwise."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adaptc.emit.genai.decoder import Served
from adaptc.emit.genai.files import ENCODER, PROGRAM
from adaptc.ir.base import Pretrained
from adaptc.optional import optional
from adaptc.rewriter.cache.signature import PAST_PREFIX, PRESENT_PREFIX

SEARCH = (
    *("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "no_repeat_ngram_size"),
    *("num_beams", "num_return_sequences", "length_penalty", "diversity_penalty", "early_stopping"),
    *("min_length", "max_length"),
)
"""The settings of a generation that onnxruntime-genai has, under transformers' names."""
IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
"""The tokens that onnxruntime-genai is told of."""
LENGTHS = ("max_position_embeddings", "max_target_positions")
"""What configurations of transformers call the most tokens of a text."""
WINDOWS = ("sliding_window", "attention_chunk_size")
"""What configurations of transformers call the number of tokens that a token attends to."""
SAYS_NOTHING = re.compile(r"_.*|transformers_version|use_cache|cache_\w+|output_\w+|return_\w+|\w+_token_id")
"""Settings that do not say which tokens come: they are not told as left out."""


@dataclass(frozen=True)
class Defaults:
    """How a base generates texts.

    Attributes:
        ids: the tokens `IDS`, those that there are; several may end a text.
        search: the settings that onnxruntime-genai has.
        left_out: the settings that it does not have.
        context_length: the most tokens of a text; None where the base does not say.
        window: how many tokens a token attends to at most; None where that is all.
    """

    ids: Mapping[str, Any]
    search: Mapping[str, Any]
    left_out: Mapping[str, Any]
    context_length: int | None
    window: int | None


def defaults_of(pretrained: Pretrained | None) -> Defaults:
    """The generation defaults of a base: of its generation_config.json, or else of its configuration."""
    if pretrained is None:
        return Defaults({}, {}, {}, None, None)
    config: Any = pretrained.config.get_text_config()
    settings = _settings(pretrained)
    ids = {
        name: next((v for v in (getattr(s, name, None) for s in (settings, config)) if v is not None), None)
        for name in IDS
    }
    stated: dict[str, Any] = settings.to_diff_dict()
    windows = [w for w in (getattr(config, name, None) for name in WINDOWS) if w is not None]
    return Defaults(
        {name: value for name, value in ids.items() if value is not None},
        {name: stated[name] for name in SEARCH if stated.get(name) is not None},
        {n: v for n, v in stated.items() if n not in SEARCH and not SAYS_NOTHING.fullmatch(n)},
        next((length for length in (getattr(config, name, None) for name in LENGTHS) if length), None),
        min(windows, default=None),
    )


def _settings(pretrained: Pretrained) -> Any:
    cls: Any = optional("transformers").GenerationConfig
    try:
        return cls.from_pretrained(pretrained.transformer)
    except OSError:  # it has no file of its own
        return cls.from_model_config(pretrained.config)


def genai_config(
    decoder: Served, defaults: Defaults, context_length: int, eos: list[int], one_buffer: bool
) -> dict[str, Any]:
    """The content of genai_config.json.

    Args:
        decoder: the program.
        defaults: how the base generates texts.
        context_length: the most tokens of a text.
        eos: the tokens that end a text; the first pads where the base has no token for that.
        one_buffer: whether keys and values stay in one buffer, which the program writes into.
    """
    ids = {"pad_token_id": eos[0], **defaults.ids, "eos_token_id": eos[0] if len(eos) == 1 else eos}
    return {
        "model": {
            "type": "decoder" if decoder.encoder is None else "whisper",
            **ids,
            "vocab_size": decoder.vocabulary,
            "context_length": context_length,
            **_programs(decoder),
        },
        "search": {
            "do_sample": False,
            **defaults.search,
            "max_length": min(defaults.search.get("max_length", context_length), context_length),
            "past_present_share_buffer": one_buffer,
        },
    }


def _programs(decoder: Served) -> dict[str, Any]:
    """The decoder's program, and its encoder's: files, sizes, and names of inputs and outputs."""
    sizes: dict[str, Any] = {
        "session_options": {"provider_options": []},
        "num_hidden_layers": decoder.layers,
        "num_key_value_heads": decoder.heads,
        "head_size": decoder.size,
    }
    encoder = decoder.encoder
    inputs = {**decoder.inputs, **_keys("past", PAST_PREFIX)}
    outputs = {"logits": decoder.logits, **_keys("present", PRESENT_PREFIX)}
    if encoder is None:
        return {"decoder": {"filename": PROGRAM, **sizes, "inputs": inputs, "outputs": outputs}}
    inputs |= _keys("cross_past", PAST_PREFIX, ".cross")
    sizes["num_attention_heads"] = decoder.heads
    beside = {"encoder_hidden_states": encoder.hidden, **_keys("cross_present", PRESENT_PREFIX, ".cross")}
    return {
        "encoder": {
            "filename": ENCODER,
            **sizes,
            "hidden_size": encoder.size,
            "inputs": {"audio_features": encoder.features.name},
            "outputs": beside,
        },
        "decoder": {"filename": PROGRAM, **sizes, "inputs": inputs, "outputs": outputs},
    }


def _keys(name: str, prefix: str, kind: str = "") -> dict[str, str]:
    """What the keys and values of each layer are called."""
    return {f"{name}_key_names": f"{prefix}%d{kind}.key", f"{name}_value_names": f"{prefix}%d{kind}.value"}
