"""A plan on the screen: a table for each entry of the spec."""

from __future__ import annotations

import math
from collections import Counter

from adaptc.cli.tables import Fitted
from adaptc.compiler.plan.adapters import PlannedInsertion
from adaptc.compiler.plan.quantization import PlannedQuantization, expected_error
from adaptc.compiler.plan.report import pattern_of
from adaptc.ir.cost import shown_bytes
from adaptc.methods.site import POINTS
from adaptc.quantization.quantized_weight import bytes_of, matrix_size


def insertion_table(place: str, planned: PlannedInsertion) -> Fitted:
    """The sites of one entry, at a place of the spec. Sites that differ in the number of their layer share a row."""
    method, selection = planned.insert.method, planned.selection
    source = f", from {planned.checkpoint.path}" if planned.checkpoint else ""
    title = f"{place}: {method.name} {planned.insert.adapter!r}{source}"
    rows: Counter[tuple[str, ...]] = Counter()
    for site in selection.sites:
        trained = sum(math.prod(p.shape) for p in method.at(site).stored(site).values() if p.trained)
        each = f"{trained:,}" if trained or not method.shared(selection.sites) else "shared"
        shape = " x ".join(map(str, site.shape))
        if site.piece:
            shape = f"{site.out_features} x {site.in_features} of {shape}"
        kind = site.kind if site.kind in POINTS else site.type or site.kind
        rows[(pattern_of(site), kind, shape, each, site.source)] += 1
    caption = ""
    if selection.unused and planned.checkpoint is None:
        caption = (
            f"matches nothing: {', '.join(selection.unused)}; near: {', '.join(selection.near) or 'none'}"
        )
    return _table(title, ("site", "times", "kind", "shape", "trained each", "source"), rows, caption)


def quantization_table(planned: PlannedQuantization, growth: float) -> Fitted:
    """The sites of one entry of `quantize`, or of the weights that the base stores in few bits already.

    Args:
        planned: the entry.
        growth: the outputs' error over that of one layer, at most, as `PlanReport.growth` estimates it.
    """
    scheme, selection = planned.item.scheme, planned.selection
    entry = "base, stored as" if planned.entry is None else f"quantize.{planned.entry}:"
    rows: Counter[tuple[str, ...]] = Counter()
    for site in selection.sites:
        size = matrix_size(site)
        error = "0" if planned.entry is None else f"{expected_error(scheme, size[1]):.3f}"
        kind, each = site.type or site.kind, shown_bytes(bytes_of(scheme, *size))
        rows[(pattern_of(site), kind, " x ".join(map(str, size)), each, error, site.source)] += 1
    columns = ("site", "times", "kind", "shape", "bytes each", "error", "source")
    orders = "; ".join(
        f"[{order}] {error:.3f} ({growth * error:.2f})" for order, error in planned.expected().items()
    )
    errors = "expected relative error of a layer (and an upper estimate for the outputs)"
    caption = f"{planned.bits:.2f} bits a weight; {errors}: {orders}"
    return _table(f"{entry} {scheme.text}", columns, rows, caption)


def _table(title: str, columns: tuple[str, ...], rows: Counter[tuple[str, ...]], caption: str) -> Fitted:
    """A table of rows, each with the number of its occurrences in the second column."""
    cells = [(first, str(times), *others) for (first, *others), times in rows.items()]
    return Fitted(title, columns, cells, caption)
