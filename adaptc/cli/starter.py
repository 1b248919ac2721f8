"""The command `adaptc init`: a first spec for a model, with a comment where there is a choice."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptc.errors import Problem, SpecError, TraceError

if TYPE_CHECKING:
    from adaptc.tracing.huggingface.start import Start

TEXT = """\
# adaptc plan {name}      shows what this matches and costs; reads no weights
# adaptc compile {name}   writes what `emit` asks for, with proofs
version: 1
base:
{base}
{inputs}{adapt}
emit:
{emit}
"""
MODEL = """\
  model: {model}
  task: {task}          # which head: feature-extraction, causal-lm, sequence-classification, ...{config}"""
FACTORY = """\
  python: "{factory}"   # what it returns is adapted; args: {{width: 64}} gives it arguments"""
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
NOT_THERE = "no {name} there; expected {expected}"
WRITES = "causal-lm"
"""The task of models that write texts."""


@dataclass(frozen=True)
class Starter:
    """A first spec.

    Attributes:
        text: what it says.
        whole: whether it can be planned: not where a person must write its inputs, or a package is missing.
    """

    text: str
    whole: bool


def starter_spec(model: str | Path, adapter: Path | None, folder: Path) -> Starter:
    """A commented spec for a Hugging Face model.

    Args:
        model: its directory, or its id on the hub.
        adapter: a trained adapter's directory; None for an adapter to be trained.
        folder: the folder of the spec, which its paths are relative to.

    Raises:
        SpecError: there is no model, or no adapter, at the path.
    """
    from adaptc.checkpoints.adapter import saved_together
    from adaptc.checkpoints.sentence_transformer import is_sentence_transformer, read_sentence_transformer
    from adaptc.compiler.adapter_base import trained_head

    directory = Path(model)
    whole = is_sentence_transformer(directory)
    transformer = read_sentence_transformer(directory).model if whole else directory
    hub = not directory.exists() and is_hub_id(str(model))
    config = {} if hub else _config(transformer, "config.json", "a Hugging Face model directory")
    task, architecture, adapt, override = "sentence-embedding" if whole else "", "", TRAIN, ""
    together = saved_together(adapter) if adapter is not None else {}
    if adapter is not None:
        first = next(iter(together.values()), adapter)
        trained = _config(first, "adapter_config.json", "a trained adapter's directory")
        adapt = _together(together, folder) or LOADED.format(adapter=_relative(adapter, folder))
        wanted, architecture, labels = trained_head(trained, first)
        task = wanted or task
        if labels:
            override = f"\n  config: {{num_labels: {labels}}}   # as the adapter's head has them"
    start = _start(str(model), config, task, architecture)
    emit = EMIT_TOGETHER if together else EMIT_SERVED if start.task == WRITES else EMIT_FOLDED
    name = str(model) if hub else _relative(directory, folder)
    text = TEXT.format(
        name="spec.yaml",
        base=MODEL.format(model=name, task=start.task, config=override),
        adapt=adapt,
        inputs=start.inputs,
        emit=EMIT_TRAIN if adapter is None else EMIT_LIVE if "quantization_config" in config else emit,
    )
    return Starter(text, start.whole)


def _together(together: Mapping[str, Path], folder: Path) -> str:
    """The alternatives that adapters saved together are; "" where there are none."""
    listed = [ONE_OF.format(name=name, adapter=_relative(path, folder)) for name, path in together.items()]
    return TOGETHER.format(adapters="\n".join(listed)) if listed else ""


def factory_spec(factory: str, inputs: Sequence[str]) -> Starter:
    """A commented spec for a module that a function returns.

    Args:
        factory: the function, as `package.module:function`.
        inputs: what the module takes, each as `x: float32[batch, 16]`.

    Raises:
        SpecError: no input is given.
    """
    if not inputs:
        advice = (
            "name what forward takes, such as --input 'x: float32[batch, 16]'; a name is a size that varies"
        )
        raise SpecError([Problem("a module of one's own needs its inputs", file=factory, notes=(advice,))])
    lines = "".join(f"  {line.strip()}\n" for line in inputs)
    text = TEXT.format(
        name="spec.yaml",
        base=FACTORY.format(factory=factory),
        adapt=TRAIN,
        inputs=f"inputs:\n{lines}",
        emit=EMIT_TRAIN,
    )
    return Starter(text, whole=True)


def is_hub_id(name: str) -> bool:
    """Whether a name can be a model's id on the hub: `org/model`, or `model`, and no path."""
    return not name.startswith((".", "/", "~")) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None


@dataclass(frozen=True)
class _Start:
    """The task, the comment on the inputs, and whether the inputs are derived."""

    task: str
    inputs: str
    whole: bool


def _start(model: str, config: dict[str, Any], task: str, architecture: str) -> _Start:
    """What a first spec says of a model; without transformers the task that the class's name says.

    Raises:
        SpecError: transformers cannot read the configuration, or has no model for it.
    """
    from adaptc.optional import MissingPackageError
    from adaptc.tracing.huggingface.start import start_of
    from adaptc.tracing.huggingface.tasks import FEATURES, dashed

    try:
        start = start_of(model, task, architecture)
    except MissingPackageError as error:
        named = str((config.get("architectures") or [""])[0])
        task = task or dashed(named.partition("For")[2]) or FEATURES
        return _Start(task, f"# {error.message}: {error.notes[0]}\n", whole=False)
    except TraceError as error:
        message, notes = error.message, error.notes
        if not Path(model).exists():
            notes = (f"nor is it an id on the hub: {message.removeprefix(f'{model}: ')}", *notes)
            message = NOT_THERE.format(name="config.json", expected="a Hugging Face model directory")
        raise SpecError([Problem(message, file=model, notes=notes)]) from error
    return _Start(start.task, _inputs(start), whole=not start.problem)


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
        raise SpecError([Problem(NOT_THERE.format(name=name, expected=expected), file=str(directory))])
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise SpecError([Problem(f"not JSON: {error}", file=str(file))]) from None


def _relative(path: Path, folder: Path) -> str:
    relative = os.path.relpath(path, folder)
    return relative if relative.startswith(".") else f"./{relative}"
