"""Tracing and exporting without the noise: what torch prints beside an error is told in words of our own."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

LOGGERS = (
    "torch.fx.experimental.symbolic_shapes",  # these two tell, on the way to an error, what its text says too
    "torch._subclasses.fake_tensor",
    "torch.onnx._internal.exporter._registration",  # of every operation of packages that are not installed
    "onnx_ir._convenience",  # of an empty list of indices, which is meant
)


class _WithoutGraphs:
    """A stream that leaves out the graphs that torch.export prints."""

    def __init__(self, stream: Any):
        self._stream, self._skips = stream, False

    def write(self, text: str) -> int:
        ends, self._skips = self._skips and text == "\n", "def forward(self" in text
        return len(text) if ends or self._skips else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def quietly() -> Iterator[None]:
    """Leave out torch's warnings, and the graph of a model that it refuses."""
    loggers = {logger: logger.level for logger in map(logging.getLogger, LOGGERS)}
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(_WithoutGraphs(sys.stderr)):  # type: ignore[type-var]
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in loggers.items():
            logger.setLevel(level)
