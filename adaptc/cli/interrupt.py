"""Ctrl-C: it ends the process at once with exit code 130, says nothing, and leaves every earlier output whole.

The signal's handler ends the process itself. An exception would be caught, swallowed or reported by whatever code it
landed in: an import, a tracer, a `__del__`, a callback from C++.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

INTERRUPTED = 130
"""The exit code: 128 and the number of SIGINT, as shells count."""
SHOW_CURSOR = b"\x1b[?25h"
"""What a terminal is told, since a progress bar hides the cursor."""


def end_on_interrupt() -> None:
    """From now on, Ctrl-C ends the process."""
    signal.signal(signal.SIGINT, _end)


def ignore_interrupt() -> None:
    """From now on, Ctrl-C does nothing: the work is done, and its exit code is known."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _end(*_: object) -> None:
    ignore_interrupt()  # another Ctrl-C, while outputs that are not finished are removed
    staging: Any = sys.modules.get("adaptc.emit.staging")
    discard = getattr(staging, "discard_all", None)  # absent while that module is imported
    if discard is not None:
        discard()
    if sys.stderr is not None and sys.stderr.isatty():
        os.write(sys.stderr.fileno(), SHOW_CURSOR)
    os._exit(INTERRUPTED)
