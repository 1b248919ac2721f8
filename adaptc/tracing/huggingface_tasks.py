"""The tasks of a Hugging Face base: one for each Auto class of transformers, and the embedding of sentences."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

from adaptc.errors import unknown
from adaptc.optional import optional
from adaptc.tracing.sentence_embedding import SentenceEmbedding

SENTENCE_EMBEDDING = "sentence-embedding"
"""The task of a SentenceTransformer directory as a whole."""


@cache
def tasks() -> dict[str, str]:
    """Task name -> Auto class, for every Auto class transformers has: `causal-lm` -> `AutoModelForCausalLM`."""
    transformers = optional("transformers")
    autos = {"feature-extraction": "AutoModel"}
    for name in dir(transformers):
        if name.startswith("AutoModelFor"):
            dashed = re.sub(
                r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", name.removeprefix("AutoModelFor")
            )
            autos[dashed.lower().replace("seq2-seq", "seq2seq")] = name
    return dict(sorted(autos.items()))


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
