"""The tasks of a Hugging Face base: one for each Auto class of transformers, and the embedding of sentences."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any, cast

from torch import nn

from adaptc.errors import TraceError, unknown
from adaptc.optional import optional
from adaptc.tracing.sentence_embedding import SentenceEmbedding

SENTENCE_EMBEDDING = "sentence-embedding"
"""The task of a SentenceTransformer directory as a whole."""
FEATURES = "feature-extraction"
"""The task of a model without a head."""
PREFERRED = ("image-text-to-text", "speech-seq2seq", "seq2seq-lm", "causal-lm", "masked-lm", FEATURES)
"""The tasks that say most of a model which the Auto classes of several tasks make, the best first."""
VAGUE = ("multimodal-lm", "pre-training", "text-encoding")
"""The tasks that say least of it."""


@cache
def tasks() -> dict[str, str]:
    """Task name -> Auto class, for every Auto class transformers has: `causal-lm` -> `AutoModelForCausalLM`."""
    transformers = optional("transformers")
    autos = {FEATURES: "AutoModel"}
    for name in dir(transformers):
        if name.startswith("AutoModelFor"):
            autos[dashed(name.removeprefix("AutoModelFor"))] = name
    return dict(sorted(autos.items()))


def dashed(name: str) -> str:
    """The name of a head as a task is spelled: `CausalLM` -> `causal-lm`."""
    hyphenated = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", name)
    return hyphenated.lower().replace("seq2-seq", "seq2seq")


def task_of(config: object, architecture: str) -> str:
    """The task whose Auto class makes a model.

    Args:
        config: its configuration.
        architecture: the name of its class; of a class that no Auto class makes, the model without its head is taken.

    Raises:
        TraceError: transformers has no Auto class for such a configuration.
    """
    classes = {task: model_classes(task, config) for task in tasks()}
    making = [task for task, models in classes.items() if models]
    exact = [task for task in making if architecture in (model.__name__ for model in classes[task])]
    fitting = exact or ([FEATURES] if FEATURES in making else making)
    if not fitting:
        raise TraceError(f"transformers has no Auto class for a {type(config).__name__}")
    order = [*PREFERRED, *(task for task in fitting if task not in PREFERRED + VAGUE), *VAGUE]
    return min(fitting, key=order.index)


def model_classes(task: str, config: object) -> tuple[type[nn.Module], ...]:
    """The classes of models that the Auto class of a task makes from a configuration; none where it makes none."""
    mapping: Any = getattr(optional("transformers"), tasks()[task])._model_mapping
    if type(config) not in mapping:
        return ()
    classes: Any = mapping[type(config)]
    return tuple(cast("tuple[type[nn.Module], ...]", classes)) if isinstance(classes, tuple) else (classes,)


def unknown_task(task: str) -> str | None:
    """The message for a task that no Auto class has; None for a task that one has."""
    names = (*tasks(), SENTENCE_EMBEDDING)
    if task in names:
        return None
    return unknown("task", task, names, close=_of_hub_task(task))


def auto_class(task: str, model: str) -> Any:
    """What makes the model of a task: an Auto class of transformers, or what is called as one.

    Raises:
        TraceError: the task is the embedding of sentences, and `model` is no directory of a SentenceTransformer.
    """
    if task == SENTENCE_EMBEDDING:
        return SentenceEmbedding(Path(model))
    return getattr(optional("transformers"), tasks()[task])


def _of_hub_task(task: str) -> list[str]:
    """Our tasks for one that the hub calls by another name, such as text-generation."""
    if task == "sentence-similarity":
        return [SENTENCE_EMBEDDING]
    pipelines: dict[str, dict[str, Any]] = optional("transformers.pipelines").SUPPORTED_TASKS
    autos = {auto.__name__ for auto in pipelines.get(task, {}).get("pt", ())}
    return [name for name, auto in tasks().items() if auto in autos]
