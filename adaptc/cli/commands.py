"""The commands of `adaptc`. Torch is imported only by those that need it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from adaptc.cli.adapter_commands import combine, convert, diff, extract
from adaptc.cli.application import Json, Plugins, Sets, SpecPath, app, load_plugins
from adaptc.cli.output import print_json, show_described, show_rows
from adaptc.cli.product_commands import bench, report, run
from adaptc.cli.verbosity import is_quiet


@app.command()
def compile(
    spec: SpecPath,
    output_dir: Annotated[Path | None, typer.Option(help="write here instead of beside the spec")] = None,
    set_: Sets = None,
    print_after: Annotated[
        str | None, typer.Option(help="print the graph after this pass, or after 'all'")
    ] = None,
    dump_graphs: Annotated[
        Path | None, typer.Option(help="write the graph after every pass into this folder")
    ] = None,
    locked: Annotated[
        bool,
        typer.Option(
            "--locked", help="refuse what differs from the lock beside the spec; write one if there is none"
        ),
    ] = False,
    with_report: Annotated[
        bool, typer.Option("--report", help="write report.html beside the products too, see `adaptc report`")
    ] = False,
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """Compile a spec: trace, insert, prove, and write what `emit` asks for."""
    load_plugins(plugin)
    from adaptc.cli.compile_command import compile_and_emit
    from adaptc.cli.screen import Screen

    screen = Screen(quiet=as_json or is_quiet())
    result = compile_and_emit(
        spec, set_ or [], output_dir, print_after, dump_graphs, screen, locked, with_report
    )
    if as_json:
        print_json(result)


@app.command()
def plan(spec: SpecPath, set_: Sets = None, plugin: Plugins = None, as_json: Json = False) -> None:
    """Show matched sites, near misses, the cost and the pipeline. Reads no weights."""
    load_plugins(plugin)
    from adaptc.cli.screen import Screen
    from adaptc.compiler.driver import plan as make_plan

    screen = Screen(quiet=as_json)
    with screen.working():
        _, planned = make_plan(spec, set_ or [])
    if as_json:
        print_json(planned.to_json())
    else:
        screen.plan(planned)


@app.command()
def init(
    model: Annotated[
        str,
        typer.Argument(
            help="a Hugging Face directory or hub id, or a function of one's own: package.module:build",
            show_default=False,
        ),
    ],
    adapter: Annotated[Path | None, typer.Option(help="a trained PEFT adapter")] = None,
    input_: Annotated[
        list[str] | None,
        typer.Option(
            "--input", help="of one's own module: 'x: float32[batch, 16]'; may be given several times"
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="the file to write; standard output if left out")
    ] = None,
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """Write a commented spec for a model, and a trained adapter if one is given. What plan would refuse is an error."""
    load_plugins(plugin)
    from adaptc.cli.init_command import first_spec
    from adaptc.cli.screen import Screen

    with Screen(quiet=True).working():
        text = first_spec(model, adapter, input_ or (), output)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text)
        sys.stderr.write(f"wrote {output}; next: adaptc plan {output}\n")
    if as_json:
        print_json({"path": output and str(output), "spec": text})
    elif output is None:
        sys.stdout.write(text)


@app.command()
def inspect(path: Annotated[Path, typer.Argument(show_default=False)], as_json: Json = False) -> None:
    """Show what an artifact, an adapter's checkpoint or a model directory holds."""
    from adaptc.cli.inspection import inspect as rows_of

    rows = rows_of(path)
    if as_json:
        print_json({row["what"]: row["value"] for row in rows})
    else:
        show_rows(str(path), rows)


@app.command()
def verify(path: Annotated[Path, typer.Argument(show_default=False)], as_json: Json = False) -> None:
    """Check an artifact: its files' hashes, and that it computes what it did when it was compiled."""
    from adaptc.cli.inspection import verify as check
    from adaptc.cli.screen import Screen

    with Screen(quiet=True).working():
        rows = check(path)
    print_json(rows) if as_json else show_rows(str(path), rows)


@app.command()
def generate(
    path: Annotated[
        Path,
        typer.Argument(
            help="a directory of format genai, or an ONNX file with cache: true", show_default=False
        ),
    ],
    prompt: Annotated[str, typer.Option(help="the text to continue", show_default=False)],
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw",
            help="put the prompt into the tokenizer's chat template, or take it as it is; "
            "by default as the template wants it where there is one",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="the most tokens that follow")] = 256,
    temperature: Annotated[
        float | None, typer.Option(help="draw tokens, at this temperature; 0 takes the likeliest")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="draw among so many of the likeliest tokens")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="draw among the likeliest tokens that have this share together")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="of what is drawn; a new one if left out")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="a text that ends the answer; may be given several times")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="the directory of the tokenizer for an ONNX file; the base's if left out"),
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(help="an .onnx_adapter file, where the path has `adapters: swap`; the base if left out"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Continue a prompt, and show the text as it grows. Settings that are left out are the model's own defaults."""
    from adaptc.cli.generate_command import generate as continue_text
    from adaptc.cli.generate_command import summary
    from adaptc.generation.settings import Settings

    settings = Settings(max_new_tokens, temperature, top_k, top_p, seed)
    show = _silent if as_json else _write
    result = continue_text(path, prompt, settings, chat, tuple(stop or ()), tokenizer, show, adapter)
    if as_json:
        print_json(result)
        return
    sys.stdout.write("\n")
    sys.stdout.flush()
    sys.stderr.write(summary(result) + "\n")


@app.command()
def adapter(
    program: Annotated[
        Path, typer.Argument(help="an ONNX program with `adapters: swap`", show_default=False)
    ],
    checkpoint: Annotated[Path, typer.Argument(help="a PEFT or adaptc checkpoint", show_default=False)],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="the .onnx_adapter file to write", show_default=False)
    ],
    as_json: Json = False,
) -> None:
    """Make one more adapter for an ONNX program that is deployed, without the base's files."""
    from adaptc.cli.screen import Screen
    from adaptc.compiler.artifacts.deployed import make_adapter

    shapes = make_adapter(program, checkpoint, output)
    if as_json:
        print_json({"path": str(output), "tensors": shapes})
    else:
        Screen().done([output])


def _method_names(typed: str) -> list[str]:
    """What a shell completes a method's name to."""
    from adaptc.methods.method import METHODS

    return [name for name in METHODS if name.startswith(typed)]


for command in (run, bench, report, combine, convert, extract, diff):
    app.command()(command)


@app.command()
def methods(
    name: Annotated[
        str | None, typer.Argument(help="a method, to see all of it", autocompletion=_method_names)
    ] = None,
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """List the methods for `adapt`; of one method its equation, its options and where it sits."""
    load_plugins(plugin)
    from adaptc.cli.listings import described, method_rows

    if name is None:
        rows = method_rows()
        print_json(rows) if as_json else show_rows("methods", rows, ("method", "equation", "sits on"))
    elif as_json:
        print_json(described(name))
    else:
        show_described(described(name))


@app.command()
def schemes(plugin: Plugins = None, as_json: Json = False) -> None:
    """List the schemes for `quantize`, with their equations and options."""
    load_plugins(plugin)
    from adaptc.cli.listings import scheme_rows

    rows = scheme_rows()
    print_json(rows) if as_json else show_rows(
        "schemes", rows, ("scheme", "equation", "stores", "chooses by")
    )


@app.command()
def passes(plugin: Plugins = None, as_json: Json = False) -> None:
    """List the passes for `passes`, with the stages each takes and leaves."""
    load_plugins(plugin)
    from adaptc.cli.listings import pass_rows

    rows = pass_rows()
    print_json(rows) if as_json else show_rows("passes", rows)


@app.command()
def schema(plugin: Plugins = None, as_json: Json = False) -> None:
    """Print the spec's JSON Schema, for editors: one JSON document, with or without --json."""
    load_plugins(plugin)
    from adaptc.spec.spec import schema_text

    sys.stdout.write(schema_text())


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _silent(text: str) -> None:
    """Show nothing: standard output holds one JSON document."""
