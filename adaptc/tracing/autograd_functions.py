"""Functions with a gradient of their own: a trace holds what they compute, and differentiates that."""

from __future__ import annotations

import inspect
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointFunction

from adaptc.tracing.author_lines import is_model_code, source_line


@contextmanager
def functions_traced() -> Generator[list[str]]:
    """Let what `torch.autograd.Function`s compute be traced in a `with` block.

    What torch's checkpointing runs is run as it is: its gradient is that of the operations inside, which a trace would
    take for a region without gradients.

    Returns:
        A list that gets a note on each class of the author's: its `backward` is no part of a trace.
    """
    function: Any = torch.autograd.Function
    original = function.__dict__["apply"]
    notes: list[str] = []

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if cls is CheckpointFunction:
            run, _, *inputs = args
            return run(*inputs)
        note = _note(cls)
        if note not in notes:
            notes.append(note)
        return original.__get__(None, cls)(*args, **kwargs)

    function.apply = classmethod(apply)
    try:
        yield notes
    finally:
        function.apply = original


def _note(cls: Any) -> str:
    try:
        path, line = inspect.getfile(cls), inspect.getsourcelines(cls)[1]
    except (OSError, TypeError):  # defined where no file is, as in a console
        path, line = "", 0
    at = f" ({source_line(path, line)})" if path and is_model_code(path) else ""
    return (
        f"the backward of {cls.__name__}{at} is no part of a graph: outputs are what its forward computes, and "
        "training differentiates that instead"
    )
