"""The command `adaptc init`: a first spec for a model, with a comment where there is a choice."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptc.errors import Problem, SpecError, TraceError

if TYPE_CHECKING:
    from adaptc.tracing.huggingface_start import Start

TEXT = """\
# adaptc plan {name}      shows what this matches and costs; reads no weights
# adaptc compile {name}   writes what `emit` asks for, with proofs
version: 1
base:
  model: {model}
  task: {task}          # which head: feature-extraction, causal-lm, sequence-classification, ...{config}
{inputs}{adapt}
emit:
{emit}
"""
TRAIN = """\
adapt:
  - method: lora              # adaptc methods lists the others
    target: all-linear        # or globs on module names: ["*.query", "*.value"]
    r: 8
    alpha: 16
    dropout: 0.05"""
LOADED = """\
adapt:
  - adapter: {adapter}        # method, targets, options and weights come from it"""
TOGETHER = """\
adapters:                     # one at a time is active, or each row of a batch has its own
{adapters}"""
ONE_OF = "  {name}: [{{adapter: {adapter}}}]"
EMIT_TRAIN = """\
  - {format: torch, path: build/trainable}           # adaptc.load brings it back; train it
  # - {format: onnx, path: build/model.onnx}         # folded: the adapter costs nothing"""
EMIT_FOLDED = """\
  - {format: onnx, path: build/model.onnx}           # folded: the adapter costs nothing
  # - {format: onnx, path: build/live.onnx, adapters: live}
  # - {format: torch, path: build/trainable}         # to train on"""
EMIT_SERVED = """\
  - {format: genai, path: build/serve}               # for onnxruntime-genai: adaptc generate build/serve --prompt ...
  # - {format: onnx, path: build/model.onnx, cache: true}
  # - {format: torch, path: build/trainable}         # to train on"""
EMIT_TOGETHER = """\
  - {format: torch, path: build/trainable}           # adaptc.load(...).set_adapter(name)
  # - {format: onnx, path: build/many.onnx, adapters: rows}   # each row of a batch names its adapter
  # - {format: onnx, path: build/base.onnx, adapters: swap}   # and one file for each: format onnx-adapter"""
EMIT_LIVE = """\
  - {format: onnx, path: build/model.onnx, adapters: live}   # the base stays quantized, the adapter beside it
  # passes: [insert, fold, quantize] folds it in and quantizes again; [insert, fold] leaves floats
  # - {format: torch, path: build/trainable}         # to train on"""
WRITES = "causal-lm"
"""The task of models that write texts."""
PEFT_TASKS = {
    "SEQ_CLS": "sequence-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
}
"""PEFT's name of a task whose head an adapter brings along -> the task."""


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
    from adaptc.checkpoints.adapter import saved_together
    from adaptc.checkpoints.sentence_transformer import is_sentence_transformer, read_sentence_transformer

    whole = is_sentence_transformer(model)
    transformer = read_sentence_transformer(model).model if whole else model
    config = _config(transformer, "config.json", "a Hugging Face model directory")
    task, architecture, adapt, override = "sentence-embedding" if whole else "", "", TRAIN, ""
    together = saved_together(adapter) if adapter is not None else {}
    if adapter is not None:
        first = next(iter(together.values()), adapter)
        trained = _config(first, "adapter_config.json", "a trained adapter's directory")
        adapt = _together(together, folder) or LOADED.format(adapter=_relative(adapter, folder))
        task = PEFT_TASKS.get(str(trained.get("task_type")), task)
        mapping: dict[str, Any] = trained.get("auto_mapping") or {}
        architecture = str(mapping.get("base_model_class", ""))
        labels = _labels(first)
        if labels and (task in PEFT_TASKS.values() or architecture.endswith("Classification")):
            override = f"\n  config: {{num_labels: {labels}}}   # as the adapter's head has them"
    task, inputs = _start(model, config, task, architecture)
    emit = EMIT_TOGETHER if together else EMIT_SERVED if task == WRITES else EMIT_FOLDED
    return TEXT.format(
        name="spec.yaml",
        model=_relative(model, folder),
        task=task,
        adapt=adapt,
        config=override,
        inputs=inputs,
        emit=EMIT_TRAIN if adapter is None else EMIT_LIVE if "quantization_config" in config else emit,
    )


def _together(together: Mapping[str, Path], folder: Path) -> str:
    """The alternatives that adapters saved together are; "" where there are none."""
    listed = [ONE_OF.format(name=name, adapter=_relative(path, folder)) for name, path in together.items()]
    return TOGETHER.format(adapters="\n".join(listed)) if listed else ""


def _labels(adapter: Path) -> int | None:
    """The number of classes of the head in an adapter's checkpoint; None if it holds no head."""
    from adaptc.checkpoints.adapter import TENSORS
    from adaptc.weights import read_safetensors

    tensors = read_safetensors(adapter / TENSORS) if (adapter / TENSORS).is_file() else {}
    rows = [w.shape[0] for key, w in tensors.items() if key.endswith((".classifier.weight", ".score.weight"))]
    return rows[0] if rows else None


def _start(directory: Path, config: dict[str, Any], task: str, architecture: str) -> tuple[str, str]:
    """The task, and the comment on the inputs; without transformers the task that the class's name says.

    Raises:
        SpecError: transformers cannot read the configuration, or has no model for it.
    """
    from adaptc.optional import MissingPackageError
    from adaptc.tracing.huggingface_start import start_of
    from adaptc.tracing.huggingface_tasks import FEATURES, dashed

    try:
        start = start_of(directory, task, architecture)
    except MissingPackageError as error:
        named = str((config.get("architectures") or [""])[0])
        return task or dashed(named.partition("For")[2]) or FEATURES, f"# {error.message}: {error.notes[0]}\n"
    except TraceError as error:
        raise SpecError([Problem(error.message, file=str(directory), notes=error.notes)]) from error
    return start.task, _inputs(start)


def _inputs(start: Start) -> str:
    """The inputs of a model as a comment, and what stands for those that are left out."""
    lines = ["inputs:                     # as derived; remove the # to take one in or to leave one out"]
    lines += [f"  {spec.name}: {spec}" for spec in start.inputs]
    lines = [f"inputs: must be written: {start.problem}"] if start.problem else lines
    lines += [f"no input: {name}; in its place: {stand_in}" for name, stand_in in start.left_out.items()]
    return "".join(f"# {line}\n" for line in lines)


def _config(directory: Path, name: str, expected: str) -> dict[str, Any]:
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
