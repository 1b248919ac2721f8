"""The command `adaptc compile`: compile a spec file, write its artifacts, and show both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from adaptc.cli.screen import Screen
from adaptc.compiler.artifacts.emit import emit_all
from adaptc.compiler.artifacts.output_paths import output_paths
from adaptc.compiler.driver import compile as compile_spec
from adaptc.compiler.lock import check_lock, write_lock
from adaptc.errors import AdaptcError, Problem, SpecError, unknown
from adaptc.ir.graph import Graph
from adaptc.products.report.page import report
from adaptc.rewriter.catalog import load_passes
from adaptc.spec.spec import load


def compile_and_emit(
    path: Path,
    overrides: Sequence[str],
    output_dir: Path | None,
    print_after: str | None,
    dump_graphs: Path | None,
    screen: Screen,
    locked: bool = False,
    with_report: bool = False,
) -> dict[str, Any]:
    """Compile a spec file and write its artifacts.

    Args:
        path: the spec file.
        overrides: `--set` settings such as `adapt.0.r=16`.
        output_dir: the folder that relative paths of artifacts start at; None for the spec's own.
        print_after: the pass after which graphs are printed, `trace`, or `all`; None for no graph.
        dump_graphs: the folder for a text file of the graph after every pass; None for no files.
        screen: where the plan and the progress are shown.
        locked: check that all is as the lock beside the spec says; write that where there is none.
        with_report: write a report beside the artifacts.

    Returns:
        Plain data: `outputs` (the artifacts' paths), `plan`, `passes` (a record of each that ran) and `proofs`.

    Raises:
        AdaptcError: anything that makes the exit code other than 0.
    """
    spec = load(path, overrides)
    if not spec.emit:
        raise spec.error(
            ("emit",), "nothing to write", "such as emit: [{format: onnx, path: build/model.onnx}]"
        )
    output_paths(spec, spec.emit, output_dir)
    names = sorted({"all", "trace", *load_passes()})
    if print_after is not None and print_after not in names:
        raise SpecError([Problem(unknown("pass", print_after, names), file="--print-after")])
    steps = 0

    def after(name: str, graph: Graph) -> None:
        nonlocal steps
        if print_after in (name, "all"):
            screen.graph(name, graph.text())
        if dump_graphs is not None:
            _dump(dump_graphs / f"{steps:02}-{name}.txt", graph.text())
        steps += 1

    with screen.working():
        compiled = compile_spec(spec, after=after)
    screen.plan(compiled.plan)
    lock = locked and not check_lock(compiled.program)
    with screen.emitting() as progress:
        artifacts = emit_all(compiled.program, spec.emit, progress, output_dir)
    outputs = [artifact.path for artifact in artifacts]
    outputs += [write_lock(compiled.program)] if lock else []
    outputs += [report([artifact.path for artifact in artifacts])] if with_report else []
    screen.done(outputs)
    ran = {"all", "trace", *(record.name for record in compiled.records)}
    if print_after is not None and print_after not in ran:
        screen.message(f"{print_after} did not run: no artifact needs it")
    return {
        "outputs": [str(output) for output in outputs],
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
