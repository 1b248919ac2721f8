"""The commands that work on adapters and specs by themselves: combine, convert, extract and diff."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from adaptc.cli.application import Json, SpecPath
from adaptc.cli.output import print_json


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
    with screen.working():
        difference = diff_specs(before, after)
    print_json(difference.to_json()) if as_json else screen.out.print(str(difference), markup=False)
    if exit_code and not difference.same:
        raise typer.Exit(1)


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
    with screen.working():
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
    print_json(made.to_json()) if as_json else show(screen, made)


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
    with screen.working():
        made = make(adapter, output or beside(adapter, to), r=r, to=to, base=base, task=task)
    print_json(made.to_json()) if as_json else show(screen, made)


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
    with screen.working():
        made = make(base, tuned, output or beside(Path(tuned), None), r=r, task=task)
    print_json(made.to_json()) if as_json else show(screen, made)
