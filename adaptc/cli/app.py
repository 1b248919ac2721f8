"""The program `adaptc`: it runs a command, and its exit code tells how that ended."""

from __future__ import annotations

import sys

from adaptc.cli.interrupt import end_on_interrupt, ignore_interrupt


def start() -> None:
    """Run the command line as a process of its own, which Ctrl-C ends wherever it lands."""
    end_on_interrupt()
    try:
        main()
    finally:
        ignore_interrupt()


def main() -> None:
    """Run the command line. An error of adaptc's own is printed without a traceback."""
    from adaptc.cli.commands import app
    from adaptc.errors import AdaptcError

    try:
        app(prog_name="adaptc")
    except AdaptcError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    start()
