"""The application that the commands belong to, and the options that several of them take."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from adaptc.cli.verbosity import CommandLine, Quiet, Verbose, set_verbosity

app = CommandLine(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
SpecPath = Annotated[Path, typer.Argument(help="the spec, a YAML file", show_default=False)]
Sets = Annotated[
    list[str] | None, typer.Option("--set", help="override a value: base.dtype=float16", show_default=False)
]
Plugins = Annotated[
    list[str] | None,
    typer.Option("--plugin", help="import a module or a .py file with methods or passes", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="print one JSON document on standard output")]


def _print_version(wanted: bool) -> None:
    if wanted:
        import adaptc

        sys.stdout.write(f"adaptc {adaptc.__version__}\n")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="print the version")
    ] = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """A declarative graph-compiler for adapted models: one spec in, proved artifacts out."""
    set_verbosity(verbose, quiet)


def load_plugins(names: list[str] | None) -> None:
    """Import what `--plugin` names; a relative path starts in the working directory."""
    if names:
        from adaptc.registry.plugins import load_plugin

        for name in names:
            load_plugin(name, Path.cwd())
