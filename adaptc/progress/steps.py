"""Steps: whatever may take over a second says so here. A watcher draws it, and a logger records how long it took.

Without a watcher a step costs nothing but its record: level INFO, the name and the seconds.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

T = TypeVar("T")
BYTES = "bytes"
"""The unit of steps that are shown as sizes."""


@dataclass(eq=False)
class Step:
    """Something that takes long.

    Attributes:
        log: the logger of the module that does it.
        name: what is done, such as `tracing`.
        total: of how many units; None where nobody knows.
        unit: what is counted, such as `rows`; `bytes` are shown as sizes.
        level: of its record when it is over.
        done: how many units are done.
        start: when it began, in seconds of the performance counter.
    """

    log: logging.Logger
    name: str
    total: int | None = None
    unit: str = ""
    level: int = logging.INFO
    done: int = 0
    start: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """How long it has taken so far."""
        return time.perf_counter() - self.start

    def advance(self, count: int = 1) -> None:
        """Tell that so many more units are done."""
        self.at(self.done + count)

    def at(self, done: int) -> None:
        """Tell how many units are done."""
        self.done = done
        watcher = _WATCHER.get()
        if watcher is not None:
            watcher.advance(self)

    def end(self) -> None:
        """Tell that it is over."""
        self.log.log(self.level, "%s: %.2f s", self.name, self.seconds)
        watcher = _WATCHER.get()
        if watcher is not None:
            watcher.end(self)


class Watcher(Protocol):
    """Shows steps. They are nested: the last that began ends first."""

    def begin(self, step: Step) -> None:
        """A step begins."""
        ...

    def advance(self, step: Step) -> None:
        """More of a step is done."""
        ...

    def end(self, step: Step) -> None:
        """A step is over."""
        ...


_WATCHER: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


@contextmanager
def watched(watcher: Watcher | None) -> Generator[None]:
    """Let a watcher see the steps of a block; None leaves whoever watches already."""
    if watcher is None:
        yield
        return
    token = _WATCHER.set(watcher)
    try:
        yield
    finally:
        _WATCHER.reset(token)


def begin(
    log: logging.Logger, name: str, total: int | None = None, unit: str = "", level: int = logging.INFO
) -> Step:
    """Begin a step, which whoever called ends."""
    step = Step(log, name, total, unit, level)
    watcher = _WATCHER.get()
    if watcher is not None:
        watcher.begin(step)
    return step


@contextmanager
def step(
    log: logging.Logger, name: str, total: int | None = None, unit: str = "", level: int = logging.INFO
) -> Generator[Step]:
    """A step that a block does."""
    begun = begin(log, name, total, unit, level)
    try:
        yield begun
    finally:
        begun.end()


def each(
    log: logging.Logger, name: str, items: Sequence[T], unit: str, level: int = logging.INFO
) -> Iterator[T]:
    """The items, in a step that counts them."""
    with step(log, name, len(items), unit, level) as counted:
        for item in items:
            yield item
            counted.advance()


class Writing:
    """Called with the bytes of a file that are written, and of how many: a step for each file.

    Args:
        log: the logger of whoever writes.
    """

    def __init__(self, log: logging.Logger):
        self._log = log
        self._step: Step | None = None

    def __call__(self, done: int, total: int) -> None:
        """Tell how many bytes are written."""
        self._step = self._step or begin(self._log, "writing", total, BYTES)
        self._step.at(done)
        if done >= total:
            self._step.end()
            self._step = None
