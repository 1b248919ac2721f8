"""What a first spec of a Hugging Face directory says: the task that loads it, and the inputs that are derived."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from adaptc.errors import TraceError
from adaptc.inputs import InputSpec
from adaptc.tracing.huggingface import read_config
from adaptc.tracing.huggingface_inputs import derive_inputs
from adaptc.tracing.huggingface_processor import given_inputs
from adaptc.tracing.huggingface_tasks import FEATURES, SENTENCE_EMBEDDING, model_classes, task_of


@dataclass(frozen=True)
class Start:
    """What is known of a model before it is compiled.

    Attributes:
        task: the task that loads it.
        inputs: its inputs, as they are derived; none where they cannot be.
        left_out: what it could take beside them -> what stands for it.
        reader: the class of its tokenizer or processor; "" where it has none.
        problem: why its inputs cannot be derived; "" where they are.
    """

    task: str
    inputs: tuple[InputSpec, ...]
    left_out: Mapping[str, str]
    reader: str
    problem: str


def start_of(directory: Path, task: str, architecture: str) -> Start:
    """What a first spec of a directory says.

    Args:
        directory: a Hugging Face model directory.
        task: the task, where it is given; "" for the one that makes a model of the class `architecture`.
        architecture: the name of the class; "" for the one that config.json names.

    Raises:
        TraceError: its configuration cannot be read, or no Auto class of transformers makes such a model.
    """
    config = read_config(str(directory), False, {})
    named = [architecture] if architecture else list(config.architectures or [""])
    task = task or task_of(config, named[0])
    classes = model_classes(FEATURES if task == SENTENCE_EMBEDDING else task, config)
    if not classes:
        raise TraceError(f"no model of task {task!r} can be made from a {type(config).__name__}")
    model = next((cls for cls in classes if cls.__name__ in named), classes[0])
    given, _ = given_inputs(str(directory), trust=False)
    reader = given.reader if given else ""
    try:
        derived = derive_inputs(model, config, given)
    except TraceError as error:
        return Start(task, (), {}, reader, error.message)
    return Start(task, derived.inputs, derived.left_out, reader, "")
