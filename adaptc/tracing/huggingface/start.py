"""What a first spec of a Hugging Face directory says: the task that loads it, and the inputs that are derived."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from adaptc.errors import TraceError
from adaptc.inputs import InputSpec
from adaptc.spec.base import BaseEntry
from adaptc.tracing.huggingface.inputs import UnknownInputsError
from adaptc.tracing.huggingface.model import load, read_config
from adaptc.tracing.huggingface.tasks import SENTENCE_EMBEDDING, model_classes, task_of


@dataclass(frozen=True)
class Start:
    """What is known of a model before it is compiled.

    Attributes:
        task: the task that loads it.
        inputs: its inputs, as they are derived, and constants; none where they cannot be.
        left_out: what it could take beside them -> what stands for it.
        problem: why its inputs cannot be derived; "" where they are.
    """

    task: str
    inputs: tuple[InputSpec, ...]
    left_out: Mapping[str, str]
    problem: str


def start_of(model: str, task: str, architecture: str) -> Start:
    """What a first spec of a model says. No weight is read.

    Args:
        model: the directory of a Hugging Face model or of a SentenceTransformer, or an id on the hub.
        task: the task, where it is given; "" for the one that makes a model of the class `architecture`.
        architecture: the name of the class; "" for the one that config.json names.

    Raises:
        TraceError: its configuration cannot be read, or no Auto class of transformers makes such a model.
        WeightError: it is quantized in a format that adaptc does not read.
    """
    if task != SENTENCE_EMBEDDING:
        config = read_config(model, False, {})
        task = task or task_of(config, architecture or (config.architectures or [""])[0])
        if not model_classes(task, config):
            raise TraceError(f"no model of task {task!r} can be made from a {type(config).__name__}")
    try:
        base = load(
            model,
            BaseEntry.model_validate({"model": model, "task": task}),
            seed=0,
            inputs=(),
        )
    except UnknownInputsError as error:
        return Start(task, (), {}, error.message)
    return Start(task, (*base.inputs, *base.constants), base.left_out, "")
