"""The commands of `adaptc`. Torch is imported only by those that need it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from adaptc.errors import AdaptcError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="A declarative graph-compiler for adapted models: one spec in, proved artifacts out.",
)
SpecPath = Annotated[Path, typer.Argument(help="the spec, a YAML file", show_default=False)]
Sets = Annotated[
    list[str] | None, typer.Option("--set", help="override a value: base.dtype=float16", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="print one JSON document on standard output")]


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
    as_json: Json = False,
) -> None:
    """Compile a spec: trace, insert, prove, and write what `emit` asks for."""
    from adaptc.cli.compile_command import compile_and_emit
    from adaptc.cli.screen import Screen

    screen = Screen(quiet=as_json)
    result = compile_and_emit(spec, set_ or [], output_dir, print_after, dump_graphs, screen, locked)
    if as_json:
        _print_json(result)


@app.command()
def plan(spec: SpecPath, set_: Sets = None, as_json: Json = False) -> None:
    """Show matched sites, near misses, the cost and the pipeline. Reads no weights."""
    from adaptc.cli.screen import Screen
    from adaptc.compiler.driver import plan as make_plan

    screen = Screen(quiet=as_json)
    with screen.working("tracing"):
        _, planned = make_plan(spec, set_ or [])
    if as_json:
        _print_json(planned.to_json())
    else:
        screen.plan(planned)


@app.command()
def diff(
    before: SpecPath,
    after: SpecPath,
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help="exit with 1 if they differ, as git diff does")
    ] = False,
    as_json: Json = False,
) -> None:
    """Tell which sites, options and products change from one spec to another. Reads no weights."""
    from adaptc.cli.screen import Screen
    from adaptc.compiler.spec_diff import diff_specs

    screen = Screen(quiet=as_json)
    with screen.working("planning both"):
        difference = diff_specs(before, after)
    _print_json(difference.to_json()) if as_json else screen.out.print(str(difference), markup=False)
    if exit_code and not difference.same:
        raise typer.Exit(1)


@app.command()
def init(
    model: Annotated[Path, typer.Argument(help="a Hugging Face model directory", show_default=False)],
    adapter: Annotated[Path | None, typer.Option(help="a trained PEFT adapter")] = None,
    output: Annotated[
        Path | None, typer.Option(help="the file to write; standard output if left out")
    ] = None,
) -> None:
    """Write a commented spec for a model, and a trained adapter if one is given."""
    from adaptc.cli.starter import starter_spec

    text = starter_spec(model, adapter, output.parent if output else Path.cwd())
    if output is None:
        sys.stdout.write(text)
    elif output.exists():
        raise AdaptcError(f"{output} exists already; remove it or choose another name")
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text)
        sys.stderr.write(f"wrote {output}; next: adaptc plan {output}\n")


@app.command()
def inspect(path: Annotated[Path, typer.Argument(show_default=False)], as_json: Json = False) -> None:
    """Show what an artifact, an adapter's checkpoint or a model directory holds."""
    from adaptc.cli.inspection import inspect as rows_of
    from adaptc.cli.screen import Screen

    rows = rows_of(path)
    _print_json({row["what"]: row["value"] for row in rows}) if as_json else Screen().table(str(path), rows)


@app.command()
def verify(path: Annotated[Path, typer.Argument(show_default=False)], as_json: Json = False) -> None:
    """Check an artifact: its files' hashes, and that it computes what it did when it was compiled."""
    from adaptc.cli.inspection import verify as check
    from adaptc.cli.screen import Screen

    rows = check(path)
    _print_json(rows) if as_json else Screen().table(str(path), rows)


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
        _print_json(result)
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
    from adaptc.compiler.deployed import make_adapter

    shapes = make_adapter(program, checkpoint, output)
    if as_json:
        _print_json({"path": str(output), "tensors": shapes})
    else:
        Screen().done([output])


Base = Annotated[
    str | None,
    typer.Option(
        help="the base: a model directory, a hub id or a spec's file; what the adapter names if left out",
        show_default=False,
    ),
]
Task = Annotated[
    str | None, typer.Option(help="the task that loads the base, where the adapter does not say it")
]
Folder = Annotated[
    Path | None, typer.Option("-o", "--output", help="the directory to write", show_default=False)
]
Rank = Annotated[int, typer.Option("--r", help="the rank of each layer's product", show_default=False)]


@app.command()
def combine(
    adapters: Annotated[list[str], typer.Argument(help="trained adapters", show_default=False)],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="the directory to write", show_default=False)
    ],
    weights: Annotated[
        str | None, typer.Option(help="what each is multiplied by, such as 0.7,-0.3; 1 if left out")
    ] = None,
    how: Annotated[
        str,
        typer.Option(help="linear, cat, ties, dare_linear, dare_ties, magnitude_prune; svd, ties_svd, ..."),
    ] = "svd",
    svd_rank: Annotated[
        int | None, typer.Option(help="with svd: the rank; the adapters' if left out")
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="with ties, dare and magnitude_prune: the share of numbers kept")
    ] = None,
    majority_sign_method: Annotated[str, typer.Option(help="with ties: total or frequency")] = "total",
    seed: Annotated[int, typer.Option(help="of what dare draws")] = 0,
    base: Base = None,
    task: Task = None,
    as_json: Json = False,
) -> None:
    """Combine trained adapters into one, as PEFT's add_weighted_adapter; with svd, of any methods."""
    from adaptc.cli.arithmetic_commands import show, weights_of
    from adaptc.cli.screen import Screen
    from adaptc.compiler.adapter_arithmetic import combine as make

    given = {"svd_rank": svd_rank, "density": density, "majority_sign_method": majority_sign_method}
    options = {key: value for key, value in given.items() if value is not None}
    screen = Screen(quiet=as_json)
    with screen.working("combining"):
        made = make(
            adapters,
            output,
            weights=weights_of(weights, len(adapters)),
            how=how,
            base=base,
            task=task,
            seed=seed,
            **options,
        )
    _print_json(made.to_json()) if as_json else show(screen, made)


@app.command()
def convert(
    adapter: Annotated[
        Path, typer.Argument(help="a trained adapter of any weight method", show_default=False)
    ],
    r: Rank,
    to: Annotated[str | None, typer.Option(help="the method of the result", show_default=False)] = None,
    output: Folder = None,
    base: Base = None,
    task: Task = None,
    as_json: Json = False,
) -> None:
    """Write the best low-rank adapter of what any weight method does, with the error of each layer."""
    from adaptc.cli.arithmetic_commands import beside, show
    from adaptc.cli.screen import Screen
    from adaptc.compiler.adapter_arithmetic import convert as make

    screen = Screen(quiet=as_json)
    with screen.working("converting"):
        made = make(adapter, output or beside(adapter, to), r=r, to=to, base=base, task=task)
    _print_json(made.to_json()) if as_json else show(screen, made)


@app.command()
def extract(
    base: Annotated[str, typer.Argument(help="the model before training", show_default=False)],
    tuned: Annotated[str, typer.Argument(help="the model after it", show_default=False)],
    r: Rank,
    output: Folder = None,
    task: Task = None,
    as_json: Json = False,
) -> None:
    """Write the low-rank adapter between two models of one shape, with the error of each layer."""
    from adaptc.cli.arithmetic_commands import beside, show
    from adaptc.cli.screen import Screen
    from adaptc.compiler.adapter_arithmetic import extract as make

    screen = Screen(quiet=as_json)
    with screen.working("extracting"):
        made = make(base, tuned, output or beside(Path(tuned), None), r=r, task=task)
    _print_json(made.to_json()) if as_json else show(screen, made)


@app.command()
def methods(as_json: Json = False) -> None:
    """List the methods for `adapt`, with their equations and options."""
    from adaptc.cli.listings import method_rows
    from adaptc.cli.screen import Screen

    rows = method_rows()
    _print_json(rows) if as_json else Screen().table("methods", rows)


@app.command()
def schemes(as_json: Json = False) -> None:
    """List the schemes for `quantize`, with their equations and options."""
    from adaptc.cli.listings import scheme_rows
    from adaptc.cli.screen import Screen

    rows = scheme_rows()
    _print_json(rows) if as_json else Screen().table("schemes", rows)


@app.command()
def passes(as_json: Json = False) -> None:
    """List the passes for `passes`, with the stages each takes and leaves."""
    from adaptc.cli.listings import pass_rows
    from adaptc.cli.screen import Screen

    rows = pass_rows()
    _print_json(rows) if as_json else Screen().table("passes", rows)


@app.command()
def schema() -> None:
    """Print the spec's JSON Schema, for editors."""
    from adaptc.spec.spec import schema_text

    sys.stdout.write(schema_text())


def _print_json(document: Any) -> None:
    sys.stdout.write(json.dumps(document, indent=2, default=str) + "\n")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _silent(text: str) -> None:
    """Show nothing: standard output holds one JSON document."""
