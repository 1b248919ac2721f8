"""Steps as bars on a terminal, with what is done and the time left; as a line now and then where there is none."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from adaptc.progress.steps import BYTES, Step, watched

SHOWN_AFTER = 1.0
"""The seconds after which a step is shown: a shorter one would only flicker."""
SECONDS_BETWEEN_LINES = 10.0
"""How often a line tells how far a step is where there is no terminal to draw a bar on."""


class LongTasks(Progress):
    """Bars of what has taken long enough."""

    def get_renderables(self) -> Iterable[RenderableType]:
        """A table of the bars."""
        yield self.make_tasks_table([task for task in self.tasks if (task.elapsed or 0.0) >= SHOWN_AFTER])


class Bars:
    """Draws the steps that take over a second, each below the one that it belongs to; a watcher of steps.

    Args:
        console: where; standard error if left out.
    """

    def __init__(self, console: Console | None = None):
        self.console = console or Console(stderr=True, highlight=False)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[amount]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        drawn = self.console.is_terminal and not self.console.quiet
        self._tasks = LongTasks(*columns, console=self.console, transient=True, disable=not drawn)
        self._numbers: dict[Step, TaskID] = {}
        self._last_line = time.monotonic()

    @contextmanager
    def drawing(self) -> Generator[None]:
        """Draw the steps of a block."""
        with self._tasks, watched(self):
            yield

    def begin(self, step: Step) -> None:
        """Draw a step from now on."""
        self._numbers[step] = self._tasks.add_task(step.name, total=step.total, amount=amount(step))

    def advance(self, step: Step) -> None:
        """Draw how far a step is; without a terminal, tell it in a line."""
        if step in self._numbers:  # else it began before anyone watched
            self._tasks.update(
                self._numbers[step], completed=step.done, total=step.total, amount=amount(step)
            )
        now = time.monotonic()
        if self._tasks.disable and now - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = now
            self.console.print(f"  {step.name}: {amount(step)}", markup=False)

    def end(self, step: Step) -> None:
        """Draw a step no more."""
        if step in self._numbers:
            self._tasks.remove_task(self._numbers.pop(step))


def amount(step: Step) -> str:
    """How much of a step is done: `3 of 12 rows`, `1.2 MB of 4.0 GB`; "" where nothing is counted."""
    if step.unit == BYTES:
        return decimal(step.done) + (f" of {decimal(step.total)}" if step.total else "")
    if not step.unit:
        return ""
    return f"{step.done} of {step.total} {step.unit}" if step.total else f"{step.done} {step.unit}"


@contextmanager
def shown(progress: bool) -> Generator[None]:
    """Draw the steps of a block on standard error, if `progress`."""
    if progress:
        with Bars().drawing():
            yield
    else:
        yield
