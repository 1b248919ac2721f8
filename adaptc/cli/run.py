"""What `adaptc compile` does: compile, emit, and say so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from adaptc.cli.console import Report
from adaptc.compiler.artifacts import emit_all
from adaptc.compiler.driver import compile as compile_spec
from adaptc.compiler.output_paths import output_paths
from adaptc.errors import AdaptcError, Problem, SpecError, unknown
from adaptc.ir.graph import Graph
from adaptc.rewriter.catalog import load_passes
from adaptc.spec.spec import load


def run_spec(
    spec: Path,
    overrides: Sequence[str],
    output_dir: Path | None,
    print_after: str | None,
    dump_graphs: Path | None,
    report: Report,
) -> dict[str, Any]:
    """Compile a spec file and write its artifacts; gives the result as plain data.

    Raises:
        AdaptcError: anything that makes the exit code other than 0.
    """
    loaded = load(spec, overrides)
    if not loaded.emit:
        raise loaded.error(
            ("emit",), "nothing to write", "such as emit: [{format: onnx, path: build/model.onnx}]"
        )
    output_paths(loaded, loaded.emit, output_dir)
    known = sorted({"all", "trace", *load_passes()})
    if print_after is not None and print_after not in known:
        raise SpecError([Problem(unknown("pass", print_after, known), file="--print-after")])
    steps = 0

    def after(name: str, graph: Graph) -> None:
        nonlocal steps
        if print_after in (name, "all"):
            report.graph(name, graph.text())
        if dump_graphs is not None:
            _dump(dump_graphs / f"{steps:02}-{name}.txt", graph.text())
        steps += 1

    with report.working("tracing and planning"):
        compiled = compile_spec(loaded, after=after)
    report.plan(compiled.plan)
    with report.artifacts() as observer:
        artifacts = emit_all(compiled.program, loaded.emit, observer, output_dir)
    paths = [artifact.path for artifact in artifacts]
    report.done(paths)
    if print_after not in (None, "all", "trace") and print_after not in [r.name for r in compiled.records]:
        report.message(f"{print_after} did not run: nothing that is written needs it")
    return {
        "outputs": [str(path) for path in paths],
        "plan": compiled.plan.to_json(),
        "passes": [asdict(record) for record in compiled.records],
        "proofs": [asdict(proof) for proof in compiled.proofs],
    }


def _dump(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    except OSError as error:
        raise AdaptcError(f"cannot write {path}: {error.strerror or error}") from error
