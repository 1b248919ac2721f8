"""A bench on the screen: sizes, timings, tokens a second and accuracies, a table each."""

from __future__ import annotations

from adaptc.cli.tables import Fitted
from adaptc.ir.cost import shown_bytes
from adaptc.products.bench import Bench, Timing


def bench_tables(bench: Bench) -> list[Fitted]:
    """The tables of a bench; those that would be empty are left out."""
    sizes = [
        (name, shown_bytes(size), shown_bytes(bench.memory[name]) if name in bench.memory else "")
        for name, size in bench.bytes.items()
    ]
    tables = [Fitted("size", ("product", "files", "memory"), sizes)]
    if bench.timings:
        rows = [_timing(timing) for timing in bench.timings]
        columns = ("product", "threads", "batch", "length", "median", "p95", "ratio")
        tables.append(
            Fitted(
                "latency", columns, rows, f"ratio to {bench.against}, whose calls took turns with the others"
            )
        )
    if bench.decodings:
        tables.append(
            Fitted(
                "decoding",
                ("product", "first token", "tokens a second"),
                [
                    (each.product, f"{1e3 * each.first:.1f} ms", f"{each.tokens_per_second or 0:.1f}")
                    for each in bench.decodings
                ],
            )
        )
    if bench.accuracies:
        tables.append(
            Fitted(
                "accuracy",
                ("product", "accuracy", "95 % interval", "right"),
                [
                    (a.product, f"{a.share:.3f}", f"{a.low:.3f} to {a.high:.3f}", f"{a.right} of {a.rows}")
                    for a in bench.accuracies
                ],
            )
        )
    return tables


def _timing(timing: Timing) -> tuple[str, ...]:
    size = (str(timing.threads), *("" if n is None else str(n) for n in (timing.batch, timing.length)))
    if timing.median is None or timing.p95 is None:
        return (timing.product, *size, "does not run:", timing.problem, "")
    ratio = "" if timing.ratio is None else f"{timing.ratio:.2f}"
    return (timing.product, *size, f"{1e3 * timing.median:.2f} ms", f"{1e3 * timing.p95:.2f} ms", ratio)
