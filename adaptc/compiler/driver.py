"""The compile as a straight line: from a spec to a compiled model, or to a plan alone."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from adaptc.compiler.alternatives.alternatives import make_alternatives
from adaptc.compiler.alternatives.maker import ProgramMaker
from adaptc.compiler.alternatives.rows_graph import rows_notes
from adaptc.compiler.alternatives.swap import swap_slots
from adaptc.compiler.artifacts.genai import check_served
from adaptc.compiler.base import make_base, trace
from adaptc.compiler.calibration import calibrate
from adaptc.compiler.changes import comparison
from adaptc.compiler.compiled import Compiled
from adaptc.compiler.plan.attention_report import attention_notes
from adaptc.compiler.plan.cache_checks import check_cached, check_virtual_tokens
from adaptc.compiler.plan.plan import Plan, make_plan
from adaptc.compiler.plan.report import PlanReport, plan_report
from adaptc.compiler.plan.schedule import check_artifacts
from adaptc.compiler.program import Program
from adaptc.compiler.proof.inputs import take_examples
from adaptc.compiler.rewrite import After, rewrite
from adaptc.ir.graph import Graph
from adaptc.ir.interpreter import Batch
from adaptc.progress.bars import shown
from adaptc.rewriter.pipeline import Compare
from adaptc.spec.spec import Spec, load


def compile(
    spec: str | os.PathLike[str] | Mapping[str, object] | Spec,
    *,
    model: nn.Module | None = None,
    example_inputs: Sequence[object] | Mapping[str, object] | None = None,
    dynamic: Mapping[str, object] | None = None,
    overrides: Sequence[str] = (),
    calibration: Iterable[Batch] | None = None,
    after: After | None = None,
    progress: bool = False,
) -> Compiled:
    """Compile a spec: load it, make its base, trace that, read the person's data, plan, rewrite, check and prove.

    Artifacts are written by `Compiled.emit`, or by the command line.

    Args:
        spec: a file, a mapping, or a Spec.
        model: a module to adapt, in place of the spec's base.
        example_inputs: tensors the module takes, by position or by name, in place of the spec's `inputs`.
        dynamic: `{"x": {0: "batch"}}`, the dimensions that vary.
        overrides: `--set` settings.
        calibration: batches of inputs with labels, for methods that choose by data, in place of the spec's file.
        after: called with a pass's name and the graph after each pass.
        progress: draw what takes long, with the time left, on standard error.

    Raises:
        SpecError: the spec is wrong; holds every problem found.
        AdaptcError: the model cannot be traced, a pass refuses, or a proof does not hold.
    """
    spec = load(spec, overrides)
    with shown(progress):
        base = make_base(spec, model, example_inputs, dynamic)
        graph = trace(spec, base, after)
        check_served(spec, graph)
        check_cached(spec, graph)
        calibrate(spec, graph, calibration)
        take_examples(spec, graph)
        program = program_of(spec, graph, base.bound.notes, after, comparison(spec.seed), weighed=True)
        program.prove_trace()
    return Compiled(program)


def program_of(
    spec: Spec,
    graph: Graph,
    notes: Sequence[str] = (),
    after: After | None = None,
    compare: Compare | None = None,
    weighed: bool = False,
) -> Program:
    """Plan a spec on a traced graph, rewrite that, and check that every artifact can be made.

    Args:
        spec: the spec.
        graph: the traced graph.
        notes: on the weights of the base, where they were bound.
        after: called with a pass's name and the graph after each pass.
        compare: measures whether a user's pass changes results; None where weights are not to be read.
        weighed: read weights to choose bits, where the spec has a budget.

    Raises:
        SpecError: something cannot be done; holds every problem of a step.
        RefusedError: a pass refuses the graph.
    """
    return program_from(spec, graph, make_plan(spec, graph, weighed), notes, after, compare)


def program_from(
    spec: Spec,
    graph: Graph,
    plan: Plan,
    notes: Sequence[str] = (),
    after: After | None = None,
    compare: Compare | None = None,
) -> Program:
    """Rewrite a traced graph by a plan, and check that every artifact can be made; see `program_of`.

    Raises:
        SpecError: an artifact cannot be made.
        RefusedError: a pass refuses the graph.
    """
    rewritten = rewrite(spec, graph, plan, after, compare)
    check_artifacts(spec, rewritten.adapted, plan.closing)
    check_virtual_tokens(spec, rewritten.adapted)
    alternatives = make_alternatives(spec, graph, plan, rewritten)
    slots = swap_slots(spec, rewritten.adapted, alternatives)
    rows = rows_notes(spec, rewritten.adapted, [a.rewritten.adapted for a in alternatives.values()])
    told = [*notes, *attention_notes(spec, graph, rewritten), *rows]
    report = plan_report(spec, graph, plan, rewritten, told)
    report.alternatives.update({name: other.plan for name, other in alternatives.items()})
    others = {name: Program(a.spec, a.plan, graph, a.rewritten) for name, a in alternatives.items()}
    program = Program(spec, report, graph, rewritten, after, others, slots)
    if "adapters" in spec.model_fields_set:
        program.maker = ProgramMaker(program)
    return program


def plan(
    spec: str | os.PathLike[str] | Mapping[str, object] | Spec, overrides: Sequence[str] = ()
) -> tuple[Spec, PlanReport]:
    """Plan a spec: the steps of `compile` up to the plan's report, without reading a weight or a row of data.

    Returns:
        The spec as resolved, and its plan.

    Raises:
        SpecError: the spec is wrong; holds every problem found.
        AdaptcError: the model cannot be traced, or a pass refuses.
    """
    spec = load(spec, overrides)
    base = make_base(spec)
    graph = trace(spec, base)
    check_served(spec, graph)
    check_cached(spec, graph)
    return spec, program_of(spec, graph).plan
