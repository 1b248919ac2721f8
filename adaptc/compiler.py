"""From a spec to a compiled model: spec, base, trace, plan, passes."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adaptc.adapt_entries import MethodEntry
from adaptc.calibration import Information, checked_rows, read_rows
from adaptc.compiled import Compiled
from adaptc.errors import InputError, ProofError, TraceError, WeightError
from adaptc.graph import Graph
from adaptc.memory import writes
from adaptc.pipeline import PassRecord
from adaptc.plan import Plan, make_plan
from adaptc.proof import Each, Proof, batches, check_weights, prove, runner, tolerance
from adaptc.spec import Spec, load, require_base, resolve_path
from adaptc.streaming import Streamed
from adaptc.tracing.base import Base
from adaptc.tracing.graph import trace
from adaptc.tracing.stored import CONFIG

After = Callable[[str, Graph], Any]


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
    """Compile a spec; products are written by `Compiled.emit`, or by the command line.

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
    loaded = load(spec, overrides)
    base = make_base(loaded, model, example_inputs, dynamic)
    graph = _trace(loaded, base)
    if after is not None:
        after("trace", graph)
    graph.information = _information(loaded, graph, calibration)
    records: list[PassRecord] = []
    plan = make_plan(loaded, graph, after, weighed=True)
    records += plan.records
    said = len(base.notes)
    _ = base.bound  # a broken checkpoint is found before anything is written
    plan.notes += base.notes[said:]
    compiled = Compiled(loaded, plan, graph, records, after)
    if base.real and base.model is not None:
        compiled.proofs.append(_prove_trace(graph, base.model))
    return compiled


def _information(
    spec: Spec, graph: Graph, batches: Iterable[Mapping[str, torch.Tensor]] | None
) -> Information | None:
    chooses = any(isinstance(e, MethodEntry) and e.build().calibrated for e in spec.adapt)
    try:
        if batches is None and spec.calibration is not None:
            batches = read_rows(resolve_path(spec, spec.calibration), graph.inputs)
        if batches is not None:
            graph.rows = checked_rows(batches, graph.inputs)
            return Information(graph) if chooses else None
    except InputError as error:
        raise spec.error(("calibration",), *str(error).splitlines()) from error
    return None


def _prove_trace(graph: Graph, model: nn.Module) -> Proof:
    """The traced graph computes what the model does.

    Raises:
        WeightError: a weight is no number.
        TraceError: no two runs of the model itself agree.
        ProofError: they differ.
    """
    changes = any(writes(node.target) for node in graph.nodes)  # such as an embedding with `max_norm`
    eager = Each(runner(copy.deepcopy(model) if changes else model))
    try:
        return prove("trace", graph.inputs, eager, Streamed(graph), tolerance(graph))
    except ProofError:
        check_weights(graph)
        known = list(batches(graph.inputs).values())
        for first, second in zip(eager(known), eager(known), strict=True):
            if (
                isinstance(first, list)
                and isinstance(second, list)
                and not all(map(torch.equal, first, second))
            ):
                raise TraceError(
                    f"{type(model).__name__} draws random numbers in evaluation mode too, so that no two runs agree\n"
                    "  expected a model that is random in training only\n"
                    "  let it depend on self.training, as nn.Dropout and F.dropout(x, p, self.training) do"
                ) from None
        raise


def plan(
    spec: str | os.PathLike[str] | Mapping[str, Any] | Spec, overrides: Sequence[str] = ()
) -> tuple[Spec, Plan]:
    """Plan a spec without reading a weight."""
    loaded = load(spec, overrides)
    return loaded, make_plan(loaded, _trace(loaded, make_base(loaded)))


def _trace(spec: Spec, base: Base) -> Graph:
    try:
        return trace(base)
    except InputError as error:
        raise spec.error(("inputs",), *str(error).splitlines()) from error


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
        raise spec.error(("base", key), *str(error).splitlines()) from error


def _importable(spec: Spec) -> None:
    """Let a factory stand in a file beside the spec, or in the working directory."""
    for folder in (str(spec.directory), str(Path.cwd())):
        if folder not in sys.path:
            sys.path.insert(0, folder)


def _huggingface(spec: Spec, entry: Any, inputs: tuple[Any, ...]) -> Base:
    try:
        from adaptc.tracing import huggingface
    except ImportError as error:
        raise spec.error(("base", "model"), "needs transformers", "pip install 'adaptc[hf]'") from error
    unknown = huggingface.unknown_task(entry.task)
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
