"""The commands `combine`, `convert` and `extract`: what they are given in words, and what they show."""

from __future__ import annotations

from pathlib import Path

from adaptc.arithmetic.combined import product_methods
from adaptc.cli.output import show_rows
from adaptc.cli.screen import Screen
from adaptc.compiler.adapter_arithmetic import Written
from adaptc.errors import Problem, SpecError


def weights_of(text: str | None, count: int) -> list[float] | None:
    """The numbers of `--weights`; None where it is left out.

    Raises:
        SpecError: they are no numbers, or not one for each adapter.
    """
    if text is None:
        return None
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        raise SpecError(
            [Problem(f"expected numbers such as 0.7,-0.3, got {text!r}", file="--weights")]
        ) from None
    if len(weights) != count:
        message = f"expected one number for each of {count} adapters, got {len(weights)}"
        raise SpecError([Problem(message, file="--weights")])
    return weights


def beside(path: Path, to: str | None) -> Path:
    """Where the result goes where nothing says it: beside the path, or here where that is a hub id."""
    name = f"{path.name}-{to or next(iter(product_methods()))}"
    return path.with_name(name) if path.exists() else Path(name)


def show(screen: Screen, made: Written) -> None:
    """Show a written adapter: each layer with its rank and error, what is held whole, what is not held, the path."""
    rows = [
        {"layer": layer, "rank": rank, "relative error": f"{made.errors[layer]:.3g}" if made.errors else "-"}
        for layer, rank in made.ranks.items()
    ]
    if rows:
        show_rows("layers", rows)
    if made.whole:
        screen.out.print(f"held whole: {', '.join(made.whole)}", markup=False)
    for note in made.notes:
        screen.out.print(f"note    {note}", markup=False)
    screen.done([made.directory])
