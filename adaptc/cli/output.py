"""What a command was asked for, on standard output: one JSON document, or tables, whose library is imported late."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any


def print_json(document: Any) -> None:
    """Print one JSON document."""
    sys.stdout.write(json.dumps(document, indent=2, default=str) + "\n")


def show_rows(title: str, rows: Sequence[Mapping[str, object]], shown: Sequence[str] = ()) -> None:
    """Print rows, whose keys are the same in each, as a table with the columns `shown`, or all."""
    from adaptc.cli.tables import show, table

    show(table(title, rows, shown))


def show_described(description: Mapping[str, Any]) -> None:
    """Print what is known of a method: its equation, its properties, and a table of its options."""
    from adaptc.cli.tables import pairs, show, table

    properties = {key: value for key, value in description.items() if key != "options" and value}
    show(pairs(properties), "")
    if description["options"]:
        show(table("options", description["options"]))
