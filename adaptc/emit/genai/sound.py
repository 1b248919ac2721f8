"""Encoders of sound, such as Whisper's, as onnxruntime-genai runs them beside a decoder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from adaptc.errors import Refusal
from adaptc.inputs import InputSpec
from adaptc.ir.analysis.token_map import content_of
from adaptc.ir.graph import Graph
from adaptc.optional import optional

AUDIO_PROCESSOR = "audio_processor_config.json"
"""The file that says how onnxruntime-genai makes features of a recording."""
EXTRACTOR = "WhisperFeatureExtractor"
"""The class of transformers that makes the features which onnxruntime-genai can make too."""
FRAMES = 3000
"""How many frames of sound onnxruntime-genai takes: 30 seconds."""
FLOATS = ("float32", "float16")
"""The dtypes of the features that it feeds."""


@dataclass(frozen=True)
class SoundEncoder:
    """How onnxruntime-genai sees an encoder of sound.

    Attributes:
        features: its input `(batch, features, frames)`.
        hidden: the output of its hidden states, `(batch, positions, size)`.
        size: of a hidden state.
    """

    features: InputSpec
    hidden: str
    size: int


def sound_encoder(graph: Graph, ids: fx.Node, others: list[InputSpec]) -> SoundEncoder | Refusal | None:
    """The encoder of sound of a traced model.

    Args:
        graph: the model.
        ids: its input of token ids.
        others: its other inputs.

    Returns:
        the encoder; why it is not run; or None where the model's encoder, if any, takes something else.
    """
    if len(others) != 1 or len(others[0].dims) != 3 or others[0].dtype not in FLOATS:
        return None
    (features,) = others
    shown = f"{features.name} {features}"
    if features.dims[2] != FRAMES:
        return Refusal(f"onnxruntime-genai hears {FRAMES} frames of sound, and the model takes {shown}")
    content, results = content_of(ids), _results(graph)
    states = [n for n, node in results.items() if node not in content and node.meta["val"].dim() == 3]
    sizes = [results[name].meta["val"].shape[-1] for name in states]
    if not states or not isinstance(sizes[0], int):
        reason = f"onnxruntime-genai needs the hidden states of the encoder of {shown}, and the model gives "
        return Refusal(reason + ", ".join(results), notes=("return encoder_last_hidden_state too",))
    return SoundEncoder(features, states[0], sizes[0])


def _results(graph: Graph) -> dict[str, fx.Node]:
    """The outputs that are tensors."""
    nodes: Any = next(node for node in graph.nodes if node.op == "output").args[0]
    pairs = zip(graph.outputs, nodes, strict=True)
    return {n: v for n, v in pairs if isinstance(v, fx.Node) and isinstance(v.meta["val"], torch.Tensor)}


def write_audio_processor(directory: Path) -> bool:
    """Write how features are made of a recording, as the base's feature extractor in the directory makes them.

    Returns:
        Whether there is one that onnxruntime-genai can do the same as.
    """
    cls: Any = optional("transformers").AutoFeatureExtractor
    try:
        extractor = cls.from_pretrained(directory)
    except (OSError, ValueError):  # there is none
        return False
    if type(extractor).__name__ != EXTRACTOR:
        return False
    windows = {"n_fft": extractor.n_fft, "hop_length": extractor.hop_length}
    mels = {**windows, "chunk_size": extractor.chunk_length, "n_mel": extractor.feature_size}
    steps: list[tuple[str, str, dict[str, int]]] = [
        ("audio_decoder", "AudioDecoder", {}),
        ("STFT", "STFTNorm", {**windows, "frame_length": extractor.n_fft}),
        ("log_mel_spectrogram", "LogMelSpectrum", mels),
    ]
    sequence = [
        {"operation": {"name": name, "type": kind, **({"attrs": attrs} if attrs else {})}}
        for name, kind, attrs in steps
    ]
    content = {"feature_extraction": {"sequence": sequence}}
    (directory / AUDIO_PROCESSOR).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return True
