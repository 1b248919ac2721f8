"""The command line, called in this process."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import traceback
from dataclasses import dataclass
from typing import Any
from unittest import mock


@dataclass(frozen=True)
class Ran:
    """What one command left: its exit code, and what it printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def run(*words: object) -> Ran:
    """Run `adaptc` with some words; an exception that escapes is a traceback on standard error, as in a shell."""
    out, err = io.StringIO(), io.StringIO()
    return Ran(_call(words, out, err), out.getvalue(), err.getvalue())


def on_a_terminal(*words: object) -> tuple[int, str]:
    """Run `adaptc` with some words: its exit code, and all that it printed, in the order of a terminal."""
    screen = io.StringIO()
    return _call(words, screen, screen), screen.getvalue()


def _call(words: tuple[object, ...], out: io.StringIO, err: io.StringIO) -> int:
    from adaptc.cli import app as command_line

    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", ["adaptc", *map(str, words)]),
    ):
        try:
            command_line.main()
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except Exception:
            traceback.print_exc(file=err)
            return 1
    return 0
