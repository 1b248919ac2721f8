"""The command `adaptc init`: a first spec for a model, with a comment where there is a choice."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import cast

from adaptc.errors import Problem, SpecError

TEXT = """\
# adaptc plan {name}      shows what this matches and costs; reads no weights
# adaptc compile {name}   writes what `emit` asks for, with proofs
version: 1
base:
  model: {model}
  task: {task}          # which head: feature-extraction, causal-lm, sequence-classification, ...{config}
adapt:
{adapt}
emit:
{emit}
"""
TRAIN = """\
  - method: lora              # adaptc methods lists the others
    target: all-linear        # or globs on module names: ["*.query", "*.value"]
    r: 8
    alpha: 16
    dropout: 0.05"""
LOADED = """\
  - adapter: {adapter}        # method, targets, options and weights come from it"""
EMIT_TRAIN = """\
  - {format: torch, path: build/trainable}           # adaptc.load brings it back; train it
  # - {format: onnx, path: build/model.onnx}         # folded: the adapter costs nothing"""
EMIT_FOLDED = """\
  - {format: onnx, path: build/model.onnx}           # folded: the adapter costs nothing
  # - {format: onnx, path: build/live.onnx, adapters: live}
  # - {format: torch, path: build/trainable}         # to train on"""
EMIT_LIVE = """\
  - {format: onnx, path: build/model.onnx, adapters: live}   # the base stays quantized, the adapter beside it
  # passes: [insert, fold, quantize] folds it in and quantizes again; [insert, fold] leaves floats
  # - {format: torch, path: build/trainable}         # to train on"""
HEADS = {
    "WhisperForConditionalGeneration": "speech-seq2seq",
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "MTModel": "seq2seq-lm",
    "ForConditionalGeneration": "seq2seq-lm",
    "ForSequenceClassification": "sequence-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "masked-lm",
    "ForImageClassification": "image-classification",
    "ForAudioClassification": "audio-classification",
    "ForCTC": "ctc",
}
"""How the name of a class in config.json's `architectures` ends -> its task. The first that fits holds."""


def starter_spec(model: Path, adapter: Path | None, folder: Path) -> str:
    """A commented spec for a model directory.

    Args:
        model: the Hugging Face model directory.
        adapter: a trained adapter's directory; None for an adapter to be trained.
        folder: the folder of the spec, which its paths are relative to.

    Returns:
        The text of the spec.

    Raises:
        SpecError: there is no model, or no adapter, at the path.
    """
    from adaptc.checkpoints.sentence_transformer import is_sentence_transformer, read_sentence_transformer

    whole = is_sentence_transformer(model)
    transformer = read_sentence_transformer(model).model if whole else model
    config = _config(transformer, "config.json", "a Hugging Face model directory")
    task = "sentence-embedding" if whole else _task(config)
    adapt, override = TRAIN, ""
    if adapter is not None:
        trained = _config(adapter, "adapter_config.json", "a trained adapter's directory")
        adapt = LOADED.format(adapter=_relative(adapter, folder))
        if trained.get("task_type") == "SEQ_CLS":
            task = "sequence-classification"
            labels = _labels(adapter)
            override = (
                f"\n  config: {{num_labels: {labels}}}   # as the adapter's head has them" if labels else ""
            )
    return TEXT.format(
        name="spec.yaml",
        model=_relative(model, folder),
        task=task,
        adapt=adapt,
        config=override,
        emit=EMIT_TRAIN if adapter is None else EMIT_LIVE if "quantization_config" in config else EMIT_FOLDED,
    )


def _labels(adapter: Path) -> int | None:
    """The number of classes of the head in an adapter's checkpoint; None if it holds no head."""
    from adaptc.checkpoints.adapter import TENSORS
    from adaptc.weights import read_safetensors

    tensors = read_safetensors(adapter / TENSORS) if (adapter / TENSORS).is_file() else {}
    rows = [w.shape[0] for key, w in tensors.items() if key.endswith((".classifier.weight", ".score.weight"))]
    return rows[0] if rows else None


def _task(config: dict[str, object]) -> str:
    architectures = config.get("architectures")
    name = (
        str(cast("list[object]", architectures)[0])
        if isinstance(architectures, list) and architectures
        else ""
    )
    return next((task for ending, task in HEADS.items() if name.endswith(ending)), "feature-extraction")


def _config(directory: Path, name: str, expected: str) -> dict[str, object]:
    file = directory / name
    if not file.is_file():
        raise SpecError([Problem(f"no {name} there; expected {expected}", file=str(directory))])
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise SpecError([Problem(f"not JSON: {error}", file=str(file))]) from None


def _relative(path: Path, folder: Path) -> str:
    relative = os.path.relpath(path, folder)
    return relative if relative.startswith(".") else f"./{relative}"
