"""The table of operations: which of torch's own are exported right, beside torch's exporter alone.

`python -m benchmarks.operations` writes docs/operations.md; with names of operations it prints their outcomes only. A
run that was cut off goes on where it stopped: its outcomes are in build/operations.jsonl, which a whole run removes. It
ends with exit code 1 if adaptc crashes, gives something else than PyTorch, or refuses what the exporter alone gets
right.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import logging
import multiprocessing
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

import adaptc
from adaptc.emit.onnx.runtime import onnx_runner
from adaptc.errors import AdaptcError
from benchmarks.operation_cases import (
    Case,
    Setting,
    UnusableError,
    cases,
    in_core_operations,
    largest_error,
    setting,
)
from benchmarks.outcomes import KINDS, RUN_ELSEWHERE, Outcome, write
from benchmarks.table import versions

BOUND = 1e-3
"""The largest error of a result that counts as right, over its largest value; a bfloat16's own rounding is more."""
SECONDS = 120
"""The time that a case has."""
LOG = Path(__file__).parents[1] / "build/operations.jsonl"


def prepared(case: Case, kind: str, covered: Iterable[str] = ()) -> tuple[Setting | None, Outcome]:
    """The module of a case and what is known of it before it is exported; no module where PyTorch does not run it.

    Args:
        case: the call.
        kind: one of `KINDS`.
        covered: core operations that need not be run again.
    """
    core: tuple[str, ...] = ()
    try:
        if kind == "core":
            case = in_core_operations(case)
            core = tuple(vars(case.call)["operations"])
            if not set(core) - set(covered):
                raise UnusableError(RUN_ELSEWHERE)
        return setting(case, kind == "dynamic"), Outcome(case.name, case.number, kind, core=core)
    except UnusableError as error:
        return None, Outcome(case.name, case.number, kind, unusable=str(error).split("\n")[0])


def exported(module: Setting, known: Outcome, beside: bool) -> Outcome:
    """The outcome of a case by adaptc, and by torch's exporter alone: always, or only where adaptc is not right."""
    with tempfile.TemporaryDirectory(prefix="adaptc-operations-") as folder:
        ours = with_adaptc(module, Path(folder))
        alone = with_exporter(module, Path(folder)) if beside or ours != "right" else ""
    return replace(known, adaptc=ours, exporter=alone)


def with_adaptc(case: Setting, folder: Path) -> str:
    """How adaptc exports a module, with an adapter on its layer."""
    spec = {"adapt": [{"method": "lora", "target": "layer", "r": 1}]}
    path = folder / "adaptc.onnx"
    try:
        made = adaptc.compile(spec, model=case.model, example_inputs=case.examples, dynamic=case.dynamic)
        made.emit("onnx", path)
    except AdaptcError as error:
        return f"refused: {error}".replace(str(folder) + "/", "")
    except Exception as error:
        return f"crash: {type(error).__name__}: {error}"
    return judged(case, path)


def with_exporter(case: Setting, folder: Path) -> str:
    """How torch's exporter alone exports a module."""
    path = folder / "exporter.onnx"
    axes = [case.dynamic.get(name, {}) for name in case.names]
    shapes = tuple(dict.fromkeys(axis, torch.export.Dim.DYNAMIC) for axis in axes)
    try:
        program: Any = torch.onnx.export(
            case.model,
            case.examples,
            dynamo=True,
            dynamic_shapes=(shapes,) if case.dynamic else None,
            input_names=case.names,
            verbose=False,
        )
        program.save(path)
    except Exception as error:
        return f"refused: {type(error).__name__}"
    return judged(case, path)


def build_once() -> None:
    """Let the exporter build its table of forms once, which takes most of its time on a small module."""
    from torch.onnx._internal.exporter import _registration

    registry: Any = _registration.ONNXRegistry
    registry.from_torchlib = staticmethod(cache(registry.from_torchlib))


def judged(case: Setting, path: Path) -> str:
    """How a program's results compare with the module's."""
    try:
        got = onnx_runner(path)(dict(zip(case.names, case.inputs, strict=True)))
    except Exception as error:
        return f"wrong: {type(error).__name__}: {error}"
    error = largest_error(case.expected, got)
    rounding = [torch.finfo(t.dtype).eps for t in case.expected if t.is_floating_point()]
    return "right" if error <= max([BOUND, *rounding]) else f"wrong: by {error:.0e}"


def once_each(names: Sequence[str]) -> Iterator[Outcome]:
    """One outcome of every operation: its first call that PyTorch runs with a dynamic axis, else one of fixed sizes.

    Args:
        names: of the operations.

    Returns:
        An operation that PyTorch runs in no way has none.
    """
    left = list(names)
    for kind, number in itertools.product(("dynamic", "fixed"), (0, 1)):
        chosen = (case for case in cases(tuple(left)) if case.number == number) if left else ()
        for outcome in outcomes(chosen, beside=False, kinds=(kind,)):
            if outcome.adaptc:
                left.remove(outcome.name)
                yield outcome


def _in_child(case: Case, kind: str, covered: set[str], beside: bool, queue: Any) -> None:
    """Put the outcome of a case, and before it what it is until the case is exported."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        module, known = prepared(case, kind, covered)
        queue.put(replace(known, adaptc="crash: the process ended") if module is not None else known)
        if module is not None:
            queue.put(exported(module, known, beside))


def outcomes(
    chosen: Iterable[Case],
    workers: int = 2,
    done: Sequence[Outcome] = (),
    beside: bool = True,
    kinds: Sequence[str] = KINDS,
) -> Iterator[Outcome]:
    """Run cases in processes of their own, which may crash or hang.

    Args:
        chosen: the cases.
        workers: the number of processes at a time.
        done: outcomes of an earlier run, which are not given again.
        beside: run torch's exporter alone too where adaptc is right.
        kinds: the ways to run each case, some of `KINDS`.
    """
    context: Any = multiprocessing.get_context("fork")
    keys, covered = {earlier.key for earlier in done}, {name for earlier in done for name in earlier.core}
    running: list[tuple[Any, Any, Outcome, float]] = []

    def ended(limit: int) -> Iterator[Outcome]:
        while len(running) > limit:
            for child in list(running):
                process, queue, known, start = child
                late = time.monotonic() - start > SECONDS
                if process.is_alive() and not late:
                    continue
                process.kill()
                process.join()
                running.remove(child)
                while not queue.empty():
                    known = queue.get()
                covered.update(known.core)
                yield known
            time.sleep(0.01)

    for case in chosen:
        for kind in kinds:
            unknown = Outcome(case.name, case.number, kind, unusable="it ends the process, or takes too long")
            if unknown.key in keys:
                continue
            yield from ended(workers - 1)
            queue = context.SimpleQueue()
            process = context.Process(target=_in_child, args=(case, kind, set(covered), beside, queue))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of threads: they are torch's, and idle
                process.start()
            running.append((process, queue, unknown, time.monotonic()))
    yield from ended(0)


def read(lines: Iterable[str]) -> list[Outcome]:
    """The outcomes of a log, one a line."""
    return [Outcome(**{**values, "core": tuple(values["core"])}) for values in map(json.loads, lines)]


def main(names: Sequence[str]) -> int:
    """Run all cases and write the page, or print the outcomes of some."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        module, _ = prepared(next(cases(["add"])), "fixed")
        assert module is not None
        build_once()
        with_adaptc(module, Path(folder))  # so that no process imports everything again
        with_exporter(module, Path(folder))
    if names:
        results = list(outcomes(cases(names)))
        print(*(json.dumps(asdict(result)) for result in results), sep="\n")
        return 0 if all(result.holds for result in results) else 1
    LOG.parent.mkdir(exist_ok=True)
    results = read(LOG.read_text().splitlines() if LOG.exists() else [])
    with LOG.open("a") as log:
        for result in outcomes(cases(), done=results):
            results.append(result)
            print(json.dumps(asdict(result)), file=log, flush=True)
    write(results, BOUND, versions())
    LOG.unlink()
    return 0 if all(result.holds for result in results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
