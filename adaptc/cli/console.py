"""What a person sees: tables and progress on standard error, tables that were asked for on standard output."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from adaptc.compiler.plan_adapters import PlannedInsertion
from adaptc.compiler.plan_quantization import PlannedQuantization, expected_error
from adaptc.compiler.plan_report import PlanReport
from adaptc.compiler.proof import Proof
from adaptc.compiler.quantization_error import QuantizationErrors
from adaptc.ir.cost import Cost
from adaptc.methods.point_sites import Site
from adaptc.methods.site import POINTS, WeightSite
from adaptc.quantization.quantized_weight import bytes_of, matrix_size
from adaptc.spec.yaml_text import flow

COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    DownloadColumn(),
    TransferSpeedColumn(),
    TimeRemainingColumn(),
)
"""Of the bar: bytes, their rate, and the time left."""
WORST = 3
"""Quantized layers that are shown, the worst first."""


class Report:
    """Writes for people; writes nothing on standard output when `quiet`, which then holds one JSON document."""

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self.out = Console(quiet=quiet, highlight=False, soft_wrap=True)
        self.err = Console(stderr=True, highlight=False, soft_wrap=True)

    @contextmanager
    def working(self, what: str) -> Iterator[None]:
        """A spinner while something runs."""
        with self.err.status(what):
            yield

    def graph(self, name: str, text: str) -> None:
        """A graph's text after a pass."""
        self.err.print(f"after {name}:", markup=False)
        self.err.print(text, markup=False)

    def message(self, text: str) -> None:
        """A line on standard error."""
        self.err.print(text, markup=False)

    def plan(self, plan: PlanReport) -> None:
        """The plan: sites, budget, pipeline, notes."""
        for planned in plan.entries:
            self.out.print(_entry(planned))
        for quantized, growth in zip(plan.quantized, plan.growth, strict=True):
            self.out.print(_quantized(quantized, growth))
        cost = plan.budget
        self.out.print(
            f"parameters  {cost.parameters:,} in the base, {cost.trainable:,} trainable ({cost.share:.3%})\n"
            f"memory      {_bytes(cost.run_bytes)} to run, {_bytes(cost.train_bytes)} to train "
            "(weights, gradients, Adam; no activations)\n"
            f"operations  {cost.base_flops:,} for {cost.example} (products, convolutions, attention); "
            f"live adapters add {cost.added_flops:,} "
            f"({cost.added_flops / max(1, cost.base_flops):.2%}), folded ones {_share(cost)}\n"
            f"pipeline    {' > '.join(plan.pipeline) or 'none'}, then factor (trainable, live) or fold (folded)"
        )
        self.out.print(f"passes:     {flow(plan.stated)}", markup=False)
        for note in plan.notes:
            self.out.print(f"note        {note}", markup=False)

    @contextmanager
    def artifacts(self) -> Iterator[Artifacts]:
        """What is written and proved: a line each, and on a terminal a bar for what takes long."""
        bar = Progress(*COLUMNS, console=self.err, transient=True, disable=not self.err.is_terminal)
        with bar:
            yield Artifacts(self.err, bar)

    def done(self, paths: Sequence[Path]) -> None:
        """What was written."""
        for path in paths:
            self.out.print(f"wrote {path} ({_bytes(_size(path))})", markup=False)

    def table(self, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows of equal keys as a table."""
        table = Table(title=title, show_lines=False)
        for column in rows[0]:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*(escape(str(value)) for value in row.values()))
        Console(highlight=False).print(table)


def _shown(errors: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {error:.3g}" for name, error in errors.items())


def _share(cost: Cost) -> str:
    """What is left of the adapters' operations when they are folded."""
    if not cost.folded_flops:
        return "none"
    return f"{cost.folded_flops:,} ({cost.folded_flops / max(1, cost.base_flops):.2%})"


@dataclass
class Artifacts:
    """Told of what happens while artifacts are written, it says so on standard error."""

    console: Console
    bar: Progress
    task: TaskID | None = None
    said: float = 0.0

    def writing(self, what: str) -> None:
        """An artifact that is being made."""
        self.console.print(f"writing {what}", markup=False)

    def wrote(self, done: int, total: int) -> None:
        """The bytes written: on the bar, or elsewhere than on a terminal a line every ten seconds."""
        if self.task is None:
            self.task = self.bar.add_task("writing", total=total)
            self.said = time.monotonic()
        self.bar.update(self.task, completed=done, total=total)
        if self.bar.disable and time.monotonic() - self.said > 10:
            self.said = time.monotonic()
            self.console.print(f"  {_bytes(done)} of {_bytes(total)}", markup=False)
        if done >= total:
            self.bar.remove_task(self.task)
            self.task = None

    def measured(self, errors: QuantizationErrors) -> None:
        """What quantization costs: the model, and its worst layers."""
        outputs = _shown(errors.outputs)
        if errors.rounded:
            outputs += f"; with activations in 8 bits, as this program has them: {_shown(errors.rounded)}"
        said = f"quantized {len(errors.layers)} weights to {errors.share:.3f} of float32's bytes"
        said = said if errors.layers else "what the base has in bits has them still"
        self.console.print(f"{said}; relative error on {errors.inputs}: {outputs}", markup=False)
        for layer in errors.layers[:WORST]:
            what = f"{layer.bits:.2f} bits, weight {layer.weight:.3g}, output {layer.error:.3g}"
            self.console.print(f"  {layer.module}: {layer.scheme}, {what}", markup=False)

    def proved(self, proof: Proof) -> None:
        """A proof that held."""
        self.console.print(f"proved  {proof}", markup=False)


def _entry(planned: PlannedInsertion) -> Table:
    method, selection = planned.insert.method, planned.selection
    source = f", from {planned.checkpoint.path}" if planned.checkpoint else ""
    table = Table(
        title=escape(f"adapt.{planned.entry}: {method.name} {planned.insert.adapter!r}{source}"),
        title_justify="left",
    )
    for column in ("site", "times", "kind", "shape", "trained each", "source"):
        table.add_column(column, overflow="fold")
    groups: dict[tuple[str, ...], list[int]] = {}
    for site in selection.sites:
        trained = sum(math.prod(p.shape) for p in method.at(site).stored(site).values() if p.trained)
        each = f"{trained:,}" if trained or not method.shared(selection.sites) else "shared"
        shape = " x ".join(map(str, site.shape))
        if site.piece:
            shape = f"{site.out_features} x {site.in_features} of {shape}"
        kind = site.kind if site.kind in POINTS else site.type or site.kind
        row = (_pattern(site), kind, shape, each, site.source)
        groups.setdefault(row, []).append(1)
    for row, members in groups.items():
        table.add_row(row[0], str(len(members)), *row[1:])
    if selection.unused and planned.checkpoint is None:
        table.caption = (
            f"matches nothing: {', '.join(selection.unused)}; near: {', '.join(selection.near) or 'none'}"
        )
    return table


def _quantized(planned: PlannedQuantization, growth: float) -> Table:
    scheme, selection = planned.item.scheme, planned.selection
    who = "base, stored as" if planned.entry is None else f"quantize.{planned.entry}:"
    table = Table(title=escape(f"{who} {scheme.text}"), title_justify="left")
    for column in ("site", "times", "kind", "shape", "bytes each", "error", "source"):
        table.add_column(column, overflow="fold")
    groups: dict[tuple[str, ...], int] = {}
    for site in selection.sites:
        size = matrix_size(site)
        shape = " x ".join(map(str, size))
        error = "0" if planned.entry is None else f"{expected_error(scheme, size[1]):.3f}"
        kind, each = site.type or site.kind, _bytes(bytes_of(scheme, *size))
        row = (_pattern(site), kind, shape, each, error, site.source)
        groups[row] = groups.get(row, 0) + 1
    for row, times in groups.items():
        table.add_row(row[0], str(times), *row[1:])
    orders = "; ".join(
        f"[{order}] {error:.3f} ({growth * error:.2f})" for order, error in planned.expected().items()
    )
    words = "relative error to expect of a layer (and at most about so much of the outputs)"
    table.caption = escape(f"{planned.bits:.2f} bits a weight; {words}: {orders}")
    return table


def _pattern(site: Site) -> str:
    plain = isinstance(site, WeightSite) and site.kind == "linear" and site.module and not site.shared
    name = (site.module if plain else site.name) + (f"[{site.piece}]" if site.piece else "")
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _size(path: Path) -> int:
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def _bytes(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
