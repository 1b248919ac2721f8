"""The base of a compile: the model that a spec or a call names, and its trace."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from adaptc.checkpoints.huggingface_weights import CONFIG
from adaptc.checkpoints.sentence_transformer import is_sentence_transformer
from adaptc.compiler.rewrite import After
from adaptc.errors import InputError, TraceError, WeightError
from adaptc.inputs import InputSpec
from adaptc.ir.base import Base
from adaptc.ir.graph import Graph
from adaptc.optional import MissingPackageError
from adaptc.progress.steps import step
from adaptc.spec.base import BaseEntry
from adaptc.spec.spec import Spec, require_base, resolve_path
from adaptc.spec.yaml_text import Loc
from adaptc.tracing.huggingface.model import load
from adaptc.tracing.huggingface.module import is_pretrained
from adaptc.tracing.huggingface.tasks import SENTENCE_EMBEDDING, unknown_task
from adaptc.tracing.module import from_examples, from_factory, from_module, from_program
from adaptc.tracing.proxy_tuning import proxy_tuned
from adaptc.tracing.trace import trace_base
from adaptc.tracing.wrappers import unwrapped

LOG = logging.getLogger(__name__)
EXAMPLE = "all-MiniLM-L6-v2"
MAKE_MODEL = "the model of the specs that come with adaptc: `make model`, in adaptc's folder, puts it there"


def make_base(
    spec: Spec,
    model: nn.Module | None = None,
    example_inputs: Sequence[object] | Mapping[str, object] | None = None,
    dynamic: Mapping[str, object] | None = None,
) -> Base:
    """The base that a call gives as `model`, or else the one that the spec names.

    Raises:
        SpecError: there is none, it is missing, or its task is unknown.
        TraceError: it cannot be made.
    """
    inputs = tuple(spec.inputs.values())
    if model is not None:
        if example_inputs is not None:
            return from_examples(model, example_inputs, dynamic)
        if not inputs and not is_pretrained(unwrapped(model)[0]):
            raise TraceError("a model needs example_inputs=(x,), or `inputs` in the spec")
        return from_module(model, inputs)
    entry = require_base(spec)
    try:
        if entry.python is not None:
            _add_to_path(spec)
            return from_factory(entry.python, entry.args, inputs, entry.dtype)
        if entry.program is not None:
            return from_program(resolve_path(spec, entry.program), inputs)
        base = _from_huggingface(spec, entry, inputs)
    except (TraceError, WeightError, MissingPackageError) as error:
        key = next(k for k in ("python", "program", "model") if getattr(entry, k) is not None)
        raise spec.error(("base", key), error.message, *error.notes) from error
    return base if entry.proxy is None else _proxy_tuned(spec, entry, base)


def trace(spec: Spec, base: Base, after: After | None = None) -> Graph:
    """The base as a graph; its weights are bound when they are first read.

    Raises:
        SpecError: the spec's `inputs` do not fit the model.
        TraceError: the model cannot be traced.
    """
    try:
        with step(LOG, "tracing the model"):
            graph = trace_base(base)
    except InputError as error:
        raise spec.error(("inputs",), error.message, *error.notes) from error
    if after is not None:
        after("trace", graph)
    return graph


def _add_to_path(spec: Spec) -> None:
    """Let a factory be imported from a file beside the spec, or in the working directory."""
    for folder in (str(spec.directory), str(Path.cwd())):
        if folder not in sys.path:
            sys.path.insert(0, folder)


def _proxy_tuned(spec: Spec, entry: BaseEntry, base: Base) -> Base:
    """The base steered by the two small models that its entry names.

    Raises:
        SpecError: one cannot be made, or has another vocabulary.
    """
    assert entry.proxy is not None
    place = ("base", "proxy")
    parts: dict[str, Base] = {}
    try:
        for key in ("tuned", "untuned"):
            place = ("base", "proxy", key)
            small = entry.model_copy(update={"model": getattr(entry.proxy, key), "proxy": None, "config": {}})
            parts[key] = _from_huggingface(spec, small, (), place)
        place = ("base", "proxy")
        return proxy_tuned(base, **parts, alpha=entry.proxy.alpha)
    except (TraceError, WeightError) as error:
        raise spec.error(place, error.message, *error.notes) from error


def _from_huggingface(
    spec: Spec, entry: BaseEntry, inputs: Sequence[InputSpec], place: Loc = ("base", "model")
) -> Base:
    """A Hugging Face model: of a directory, or of a hub id.

    Args:
        spec: the spec.
        entry: the model, its task and what overrides its configuration.
        inputs: its inputs; derived where there are none.
        place: where the spec names the model.

    Raises:
        SpecError: transformers is not installed, the task is unknown, or there is no such directory.
    """
    assert entry.model is not None
    unknown = unknown_task(entry.task)
    if unknown:
        raise spec.error(("base", "task"), unknown)
    directory = resolve_path(spec, entry.model)
    if directory.exists():
        if not (directory / CONFIG).is_file() and entry.task != SENTENCE_EMBEDDING:
            expected = "expected a Hugging Face model directory"
            if is_sentence_transformer(directory):
                expected = f"it is a SentenceTransformer: task: {SENTENCE_EMBEDDING}"
            raise spec.error(place, f"{directory} holds no {CONFIG}", expected)
        return load(str(directory), entry, spec.seed, tuple(inputs))
    if entry.model.startswith((".", "/", "~")) or entry.model.count("/") > 1 or Path(entry.model).suffix:
        message = f"{directory}: no such directory"
        where = (MAKE_MODEL,) if directory.name == EXAMPLE else ()
        raise spec.error(place, message, "paths are relative to the spec file", *where)
    return load(entry.model, entry, spec.seed, tuple(inputs))
