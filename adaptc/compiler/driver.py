"""From a spec to a compiled model, step by step."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adaptc.checkpoints.huggingface_weights import CONFIG
from adaptc.compiler.calibration import Information, checked_rows, read_rows
from adaptc.compiler.changes import comparison
from adaptc.compiler.compiled import Compiled
from adaptc.compiler.plan import make_plan
from adaptc.compiler.plan_report import PlanReport, plan_report
from adaptc.compiler.program import Program
from adaptc.compiler.rewrite import After, rewrite
from adaptc.compiler.schedule import check_artifacts
from adaptc.errors import InputError, TraceError, WeightError
from adaptc.ir.base import Base
from adaptc.ir.graph import Graph
from adaptc.spec.entries import MethodEntry
from adaptc.spec.spec import Spec, load, require_base, resolve_path
from adaptc.tracing.trace import trace_base as trace


def compile(
    spec: str | os.PathLike[str] | Mapping[str, Any] | Spec,
    *,
    model: nn.Module | None = None,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    dynamic: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
    calibration: Iterable[Mapping[str, torch.Tensor]] | None = None,
    after: After | None = None,
) -> Compiled:
    """Compile a spec: load, base, trace, calibration, plan, rewrite, check, program, proof.

    Artifacts are written by `Compiled.emit`, or by the command line.

    Args:
        spec: a file, a mapping, or a Spec.
        model: a module to adapt, in place of the spec's base.
        example_inputs: tensors the module takes, by position or by name; the spec's `inputs` may stand instead.
        dynamic: `{"x": {0: "batch"}}`, the dimensions that vary.
        overrides: `--set` settings.
        calibration: batches of inputs with labels, for methods that choose by data, in place of the spec's file.
        after: called with a pass's name and the graph after each pass.

    Raises:
        SpecError: the spec is wrong; holds every problem found.
        AdaptcError: the model cannot be traced, a pass refuses, or a proof does not hold.
    """
    spec = load(spec, overrides)
    base = make_base(spec, model, example_inputs, dynamic)
    graph = _trace(spec, base, after)
    _calibrate(spec, graph, calibration)
    plan = make_plan(spec, graph, weighed=True)
    rewritten = rewrite(spec, graph, plan, after, comparison(spec.seed))
    check_artifacts(spec, rewritten.adapted, plan.closing)
    report = plan_report(spec, graph, plan, rewritten, base.bound.notes)
    program = Program(spec, report, graph, rewritten, after)
    program.prove_trace()
    return Compiled(program)


def plan(
    spec: str | os.PathLike[str] | Mapping[str, Any] | Spec, overrides: Sequence[str] = ()
) -> tuple[Spec, PlanReport]:
    """Plan a spec: what `compile` does up to the check, without a weight or a row of data."""
    spec = load(spec, overrides)
    base = make_base(spec)
    graph = _trace(spec, base)
    plan = make_plan(spec, graph)
    rewritten = rewrite(spec, graph, plan)
    check_artifacts(spec, rewritten.adapted, plan.closing)
    return spec, plan_report(spec, graph, plan, rewritten)


def _trace(spec: Spec, base: Base, after: After | None = None) -> Graph:
    """The base as a graph."""
    try:
        graph = trace(base)
    except InputError as error:
        raise spec.error(("inputs",), error.message, *error.notes) from error
    if after is not None:
        after("trace", graph)
    return graph


def _calibrate(spec: Spec, graph: Graph, batches: Iterable[Mapping[str, torch.Tensor]] | None) -> None:
    """Give a graph the rows of data, and where a method chooses by it the Fisher information."""
    try:
        if batches is None and spec.calibration is not None:
            batches = read_rows(resolve_path(spec, spec.calibration), graph.inputs)
        if batches is None:
            return
        graph.calibration_rows = checked_rows(batches, graph.inputs)
        if any(isinstance(entry, MethodEntry) and entry.build().calibrated for entry in spec.adapt):
            graph.fisher_information = Information(graph)
    except InputError as error:
        raise spec.error(("calibration",), error.message, *error.notes) from error


def make_base(
    spec: Spec,
    model: nn.Module | None = None,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    dynamic: Mapping[str, Any] | None = None,
) -> Base:
    """The base that a spec (or a call) names.

    Raises:
        SpecError: there is none, it is missing, or its task is unknown.
        TraceError: it cannot be made.
    """
    from adaptc.tracing import module as modules

    inputs = tuple(spec.inputs.values())
    if model is not None:
        if example_inputs is not None:
            inputs = modules.inputs_from_examples(model, example_inputs, dynamic)
        if not inputs:
            raise TraceError("a model needs example_inputs=(x,), or `inputs` in the spec")
        return modules.from_module(model, inputs)
    entry = require_base(spec)
    try:
        if entry.python is not None:
            _importable(spec)
            return modules.from_factory(entry.python, entry.args, inputs, entry.dtype)
        if entry.program is not None:
            return modules.from_program(resolve_path(spec, entry.program), inputs)
        return _huggingface(spec, entry, inputs)
    except (TraceError, WeightError) as error:
        key = next(k for k in ("python", "program", "model") if getattr(entry, k) is not None)
        raise spec.error(("base", key), error.message, *error.notes) from error


def _importable(spec: Spec) -> None:
    """Let a factory stand in a file beside the spec, or in the working directory."""
    for folder in (str(spec.directory), str(Path.cwd())):
        if folder not in sys.path:
            sys.path.insert(0, folder)


def _huggingface(spec: Spec, entry: Any, inputs: tuple[Any, ...]) -> Base:
    try:
        from adaptc.tracing import huggingface
        from adaptc.tracing.huggingface_tasks import unknown_task
    except ImportError as error:
        raise spec.error(("base", "model"), "needs transformers", "pip install 'adaptc[hf]'") from error
    unknown = unknown_task(entry.task)
    if unknown:
        raise spec.error(("base", "task"), unknown)
    directory = resolve_path(spec, entry.model)
    if directory.exists():
        if not (directory / CONFIG).is_file():
            raise spec.error(
                ("base", "model"),
                f"{directory} holds no {CONFIG}",
                "expected a Hugging Face model directory",
            )
        return huggingface.load(str(directory), entry, spec.seed, inputs)
    if entry.model.startswith((".", "/", "~")) or entry.model.count("/") > 1 or Path(entry.model).suffix:
        raise spec.error(
            ("base", "model"), f"{directory}: no such directory", "paths are relative to the spec file"
        )
    return huggingface.load(entry.model, entry, spec.seed, inputs)
