"""The reference of the command line, from the commands themselves."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import typer.main

from adaptc.cli.commands import app

KINDS = {Path: "path", str: "text", int: "whole number", float: "number"}


def commands_page() -> str:
    """Every command with its arguments and options."""
    group: Any = typer.main.get_command(app)
    lines = [
        "# The command line",
        "",
        "Exit codes: 0 done; 1 the compile failed (a proof did not hold, an operation cannot be exported);",
        "2 the spec or the command is wrong. With `--json`, standard output holds one JSON document and nothing",
        "else. Messages and progress go to standard error.",
        "After a failure, what stood at the output paths before still stands there.",
        "",
    ]
    if group.params:
        lines += ["## adaptc", "", _table(group.params)]
    for name, command in sorted(group.commands.items()):
        if not command.hidden:
            lines += [
                f"## adaptc {name}",
                "",
                inspect.cleandoc(command.help or "").replace("\f", ""),
                "",
                _usage(name, command),
                "",
            ]
            lines += [_table(command.params)]
    return "\n".join(lines)


def _usage(name: str, command: Any) -> str:
    required = [p for p in command.params if p.param_type_name == "argument"]
    words = [(p.metavar or p.name).upper() for p in required]
    words += [
        f"{p.opts[-1]} {p.name.upper()}"
        for p in command.params
        if p.param_type_name == "option" and p.required
    ]
    return f"    adaptc {' '.join([name, *words, '[OPTIONS]'])}"


def _table(parameters: list[Any]) -> str:
    rows = []
    for p in parameters:
        shown = (
            f"`{p.name.upper()}`"
            if p.param_type_name == "argument"
            else ", ".join(f"`{o}`" for o in [*p.opts, *p.secondary_opts])
        )
        kind = "" if getattr(p, "is_flag", False) else KINDS.get(p.type_descriptor.annotation, "")
        help_ = (getattr(p, "help", "") or "").replace("|", r"\|")
        default = (
            f"`{p.default}`"
            if isinstance(p.default, str | int | float) and not isinstance(p.default, bool)
            else ""
        )
        rows.append(f"| {shown} | {kind} | {default} | {help_} |")
    if not rows:
        return ""
    return "\n".join(["| | takes | if left out | |", "| --- | --- | --- | --- |", *rows]) + "\n"
