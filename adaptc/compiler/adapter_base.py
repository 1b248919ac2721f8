"""The base of a trained adapter, where no spec says it: what its configuration names, and the task that loads it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adaptc.checkpoints.adapter import TENSORS, directories, why_missing
from adaptc.checkpoints.config_file import CONFIG, read_config
from adaptc.errors import Problem, SpecError, TraceError
from adaptc.spec.base import DEFAULT_TASK
from adaptc.spec.source import Source
from adaptc.spec.spec import VERSION
from adaptc.weights import read_safetensors

PEFT_TASKS = {
    "SEQ_CLS": "sequence-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
}
"""PEFT's name of a task whose head an adapter brings along -> the task."""
SPECS = (".yaml", ".yml")
"""The endings of a spec's file."""
BaseOf = str | Path | Mapping[str, Any] | None
"""What names a base: a model directory, a hub id, a spec's file, or a mapping with a spec's `base` and `inputs`. None
is what the adapter's configuration names."""


def trained_head(config: Mapping[str, Any], adapter: Path) -> tuple[str, str, int | None]:
    """What an adapter says of the model it was trained on.

    Args:
        config: its configuration.
        adapter: its directory.

    Returns:
        The task that its head needs, "" if it says none; the class of the model, "" likewise; the classes of its head.
    """
    task = PEFT_TASKS.get(str(config.get("task_type")), "")
    mapping: dict[str, Any] = config.get("auto_mapping") or {}
    architecture = str(mapping.get("base_model_class", ""))
    labels = _labels(adapter)
    classifies = task in PEFT_TASKS.values() or architecture.endswith("Classification")
    return task, architecture, labels if classifies else None


def _labels(adapter: Path) -> int | None:
    """The number of classes of the head in an adapter's checkpoint; None if it holds no head."""
    tensors = read_safetensors(adapter / TENSORS) if (adapter / TENSORS).is_file() else {}
    rows = [w.shape[0] for key, w in tensors.items() if key.endswith((".classifier.weight", ".score.weight"))]
    return rows[0] if rows else None


def base_of(adapter: Path | None, base: BaseOf, task: str | None) -> Source:
    """What a spec would say of the base of an adapter, and nothing else.

    Args:
        adapter: a trained adapter, whose configuration names the base and its task; None where there is none.
        base: the base, where it is given.
        task: the task, where it is given.

    Raises:
        SpecError: nothing names a base, or transformers makes no such model.
        WeightError: there is no adapter.
    """
    if isinstance(base, Mapping):
        return Source(None, {"version": VERSION, **base})
    if base is not None and str(base).endswith(SPECS):
        stated = Source.read(Path(base)).data
        return Source(
            Path(base), {key: stated[key] for key in ("version", "base", "inputs") if key in stated}
        )
    config = _config(adapter) if adapter is not None else {}
    model = base or config.get("base_model_name_or_path")
    if not model:
        message = f"{CONFIG} names no base" if adapter is not None else "no base is given"
        raise SpecError([Problem(message, file=str(adapter or "--base"), notes=("say it: --base MODEL",))])
    wanted, architecture, labels = trained_head(config, adapter) if adapter is not None else ("", "", None)
    entry: dict[str, Any] = {"model": str(model), "task": task or _task(str(model), wanted, architecture)}
    labelled = entry | ({"config": {"num_labels": labels}} if labels else {})
    return Source(None, {"version": VERSION, "base": labelled})


def _config(adapter: Path) -> dict[str, Any]:
    """The configuration of an adapter, of the first of several.

    Raises:
        SpecError: there is none.
    """
    absent = why_missing(adapter)
    if absent:
        raise SpecError([Problem(absent, file=str(adapter))])
    return dict(read_config(directories(adapter)[0] / CONFIG))


def _task(model: str, task: str, architecture: str) -> str:
    """The task that loads a model.

    Raises:
        SpecError: transformers cannot read its configuration, or has no model for it.
    """
    from adaptc.tracing.huggingface.start import start_of

    try:
        return start_of(model, task, architecture).task or DEFAULT_TASK
    except TraceError as error:
        raise SpecError([Problem(error.message, file=model, notes=error.notes)]) from error
