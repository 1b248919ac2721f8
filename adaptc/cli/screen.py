"""The screen: the plan, the progress of a compile, and tables.

What a command was asked for goes to standard output, progress to standard error.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from adaptc.cli.plan_tables import insertion_table, quantization_table
from adaptc.cli.tables import labelled
from adaptc.cli.verbosity import is_quiet
from adaptc.compiler.plan.report import PlanReport
from adaptc.compiler.proof.proof import Proof
from adaptc.compiler.proof.quantization_error import QuantizationErrors
from adaptc.ir.cost import shown_bytes
from adaptc.progress.bars import Bars

LABEL = 12
"""How wide the labels of a plan's summary are."""
WORST = 3
"""How many quantized layers are shown, those with the largest error first."""


class Screen:
    """Prints for a person.

    Args:
        quiet: print nothing on standard output, which then holds one JSON document.
    """

    def __init__(self, quiet: bool = False):
        self.out = Console(quiet=quiet, highlight=False, soft_wrap=True)
        self.err = Console(stderr=True, quiet=is_quiet(), highlight=False, soft_wrap=True)

    @contextmanager
    def working(self) -> Generator[None]:
        """Draw what takes long in a block, with the time left, on standard error."""
        with Bars(self.err).drawing():
            yield

    def graph(self, name: str, text: str) -> None:
        """Print a graph as it is after a pass, on standard error."""
        self.err.print(f"after {name}:", markup=False)
        self.err.print(text, markup=False)

    def message(self, text: str) -> None:
        """Print a line on standard error."""
        self.err.print(text, markup=False)

    def plan(self, plan: PlanReport) -> None:
        """Print a plan: the sites of each entry, the cost, the pipeline, the notes."""
        added = [entry for name in plan.alternatives for entry in plan.added(name)]
        for place, planned in [*zip(plan.places, plan.entries, strict=True), *added]:
            self.out.print(insertion_table(place, planned))
        for quantized, growth in zip(plan.quantized, plan.growth, strict=True):
            self.out.print(quantization_table(quantized, growth))
        lines = plan.summary.splitlines()
        self.out.print(labelled(lines, LABEL) if self.out.is_terminal else plan.summary, markup=False)

    @contextmanager
    def emitting(self) -> Generator[EmitLines]:
        """Show the progress of writing and proving artifacts: a line for each, and on a terminal bars."""
        with self.working():
            yield EmitLines(self.err)

    def done(self, paths: Sequence[Path]) -> None:
        """Print the path and size of each artifact written."""
        for path in paths:
            self.out.print(f"wrote {path} ({shown_bytes(_size(path))})", markup=False)


@dataclass
class EmitLines:
    """Prints what happens while artifacts are written and proved; an `Observer` of `emit_all`.

    Attributes:
        console: where lines are printed.
    """

    console: Console

    def writing(self, what: str) -> None:
        """Print the format and path of the artifact that is being made."""
        self.console.print(f"writing {what}", markup=False)

    def measured(self, errors: QuantizationErrors) -> None:
        """Print what quantization costs: the error of the outputs, and the layers with the largest errors."""
        outputs = _shown_errors(errors.outputs)
        if errors.rounded:
            outputs += (
                f"; with activations rounded to 8 bits, as this program does: {_shown_errors(errors.rounded)}"
            )
        result = f"quantized {len(errors.layers)} weights to {errors.share:.3f} of their bytes in float32"
        result = result if errors.layers else "the base's quantized weights are unchanged"
        self.console.print(f"{result}; relative error on {errors.inputs}: {outputs}", markup=False)
        for layer in errors.layers[:WORST]:
            numbers = f"{layer.bits:.2f} bits, weight {layer.weight:.3g}, output {layer.error:.3g}"
            self.console.print(f"  {layer.module}: {layer.scheme}, {numbers}", markup=False)

    def proved(self, proof: Proof) -> None:
        """Print a proof that held."""
        self.console.print(f"proved  {proof}", markup=False)

    def noted(self, note: str) -> None:
        """Print what a person must know who uses an artifact."""
        self.console.print(f"note    {note}", markup=False)


def _shown_errors(errors: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {error:.3g}" for name, error in errors.items())


def _size(path: Path) -> int:
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())
