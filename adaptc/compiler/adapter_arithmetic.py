"""Adapters made of others and written as checkpoints: combined, converted, or taken from two models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from adaptc.arithmetic.change import changes_between
from adaptc.arithmetic.combined import Origin, combined
from adaptc.arithmetic.layers import Part
from adaptc.arithmetic.merging import Merge
from adaptc.compiler.adapter_base import BaseOf, base_of
from adaptc.compiler.base import make_base, trace
from adaptc.compiler.compiled import Compiled
from adaptc.compiler.driver import program_from, program_of
from adaptc.compiler.plan.adapters import PlannedInsertion
from adaptc.compiler.plan.plan import Plan
from adaptc.errors import Problem, SpecError, WeightError
from adaptc.ir.graph import Graph
from adaptc.spec.source import Source
from adaptc.spec.spec import Spec
from adaptc.weights import Weight


@dataclass(frozen=True)
class Written:
    """An adapter that was written.

    Attributes:
        directory: where.
        ranks: layer -> the rank of its product.
        errors: layer -> the relative error of the product in the Frobenius norm, where it stands for a change.
        whole: the tensors that the checkpoint holds whole, since no product can: biases, norms, heads.
        notes: what the adapter does not hold, a line each.
    """

    directory: Path
    ranks: dict[str, int]
    errors: dict[str, float]
    whole: list[str]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """Plain data: the attributes by their names."""
        return {**asdict(self), "directory": str(self.directory)}


def combine(
    adapters: Sequence[str | Path],
    directory: str | Path,
    *,
    weights: Sequence[float] | None = None,
    how: str = "svd",
    base: BaseOf = None,
    task: str | None = None,
    **options: Any,
) -> Written:
    """Combine trained adapters into one, as PEFT's `add_weighted_adapter`, and write it as a checkpoint.

    Args:
        adapters: their checkpoints.
        directory: where to write.
        weights: what each is multiplied by; one if left out. Less than zero takes an adapter's effect away.
        how: as in an entry of a spec: `linear`, `cat`, `ties`, `dare_linear`, `dare_ties` and `magnitude_prune` combine
            the factors of LoRA; `svd`, and `_svd` behind one of the last four, the changes of any method.
        base: the base; what the first adapter's configuration names if left out.
        task: the task that loads it, where the adapter does not say it.
        **options: `svd_rank`, `density`, `majority_sign_method`, `to`, `seed`.

    Raises:
        SpecError: an option is wrong, or an adapter cannot be combined so.
        WeightError: an adapter cannot be read, or was trained on another base.
    """
    factors = [1.0] * len(adapters) if weights is None else list(weights)
    if len(factors) != len(adapters):
        raise WeightError(f"{len(adapters)} adapters have {len(factors)} weights; give one for each")
    paths = [Path(adapter).absolute() for adapter in adapters]
    seed: dict[str, Any] = {"seed": options.pop("seed")} if "seed" in options else {}
    members = [{"adapter": str(path), "weight": float(w)} for path, w in zip(paths, factors, strict=True)]
    entry: dict[str, Any] = {"combine": members, "how": how, **options}
    try:
        spec = _spec(base_of(paths[0] if paths else None, base, task), adapt=[entry], **seed)
        program = program_of(spec, trace(spec, make_base(spec)))
    except SpecError as error:
        raise SpecError(_shown(problem) for problem in error.problems) from error
    return _write(Compiled(program), Path(directory))


def _shown(problem: Problem) -> Problem:
    """A problem with an option, named as the command and the function name it."""
    key = problem.key.removeprefix("adapt.0").removeprefix(".")
    return problem if key == problem.key else replace(problem, file="combine", key=key)


def convert(
    adapter: str | Path,
    directory: str | Path,
    *,
    r: int,
    to: str | None = None,
    base: BaseOf = None,
    task: str | None = None,
) -> Written:
    """Write the best low-rank adapter of what any weight method does: of each weight's change the truncated SVD.

    Args:
        adapter: a trained adapter of any method that changes weights.
        directory: where to write.
        r: the rank; a layer with a smaller side has that.
        to: the method; the first that can hold any change if left out.
        base: as in `combine`.
        task: as in `combine`.

    Raises:
        SpecError: the adapter changes no weights, or `to` cannot hold what others do.
        WeightError: the adapter cannot be read, or was trained on another base.
    """
    options: dict[str, Any] = {} if to is None else {"to": to}
    return combine([adapter], directory, how="svd", svd_rank=r, base=base, task=task, **options)


def extract(
    base: str | Path | Mapping[str, Any],
    tuned: str | Path | Mapping[str, Any],
    directory: str | Path,
    *,
    r: int,
    task: str | None = None,
) -> Written:
    """Write the low-rank adapter between two models of one shape, tensor by tensor.

    Matrices get a product of rank r; biases, norms and other tensors that differ are held whole.

    Args:
        base: the model before training, as in `combine`.
        tuned: the model after it.
        directory: where to write.
        r: the rank.
        task: the task that loads both.

    Raises:
        SpecError: one is missing.
        WeightError: they are not of one shape, or equal.
    """
    spec = _spec(base_of(None, base, task))
    graph = trace(spec, make_base(spec))
    other = _spec(base_of(None, tuned, task or getattr(spec.base, "task", None)))
    after = trace(other, make_base(other))
    _check_one_shape(graph, after, str(tuned))
    parts = [Part(1.0, graph, changes_between(graph, after.weights))]
    if not parts[0].changes:
        raise WeightError(f"{tuned} has the same weights as {base}: there is nothing to extract")
    result = combined(graph, parts, Merge("svd"), r)
    starts, path = result.starts(), Path(str(tuned)) if not isinstance(tuned, Mapping) else Path()
    result.origins = [Origin(str(path), path, after.base_sha256)]
    entries = [
        PlannedInsertion(0, item, item.selection(graph), starts=starts, combined=result)
        for item in result.inserts("default", 0, "share")
    ]
    plan = Plan(entries, [], [planned.insert for planned in entries], [])
    notes = [
        f"{name} differs, and is a buffer, which no adapter holds" for name in _buffers(graph, after.weights)
    ]
    return _write(Compiled(program_from(spec, graph, plan)), Path(directory), notes)


def _spec(base: Source, **keys: object) -> Spec:
    """The spec of a base with more keys."""
    return Spec.from_source(replace(base, data={**base.data, **keys}))


def _check_one_shape(graph: Graph, tuned: Graph, shown: str) -> None:
    """Check that two models have the same tensors and operations.

    Raises:
        WeightError: a tensor is missing, added, of another shape or tied otherwise, or they compute otherwise.
    """
    ours, theirs = ({name: w.shape for name, w in g.weights.items()} for g in (graph, tuned))
    name = next((n for n in ours | theirs if ours.get(n) != theirs.get(n)), None)
    if name is not None:
        sides = [list(shapes[name]) if name in shapes else "none" for shapes in (ours, theirs)]
        raise WeightError(
            f"{shown} is of another shape than its base: {name} is {sides[1]}, expected {sides[0]}"
        )
    tied = next((n for n in graph.aliases if graph.aliases[n] != tuned.aliases[n]), None)
    if tied is not None:
        pairs = [
            f"{tied} {'stands alone' if g.aliases[tied] == tied else f'is {g.aliases[tied]}'}"
            for g in (graph, tuned)
        ]
        raise WeightError(f"{shown} ties other tensors than its base: there {pairs[0]}, here {pairs[1]}")
    if graph.operations != tuned.operations:
        raise WeightError(
            f"{shown} has other operations than its base: it is another model, or configured otherwise"
        )


def _buffers(graph: Graph, tuned: Mapping[str, Weight]) -> list[str]:
    """The buffers whose values differ."""
    return [n for n in sorted(graph.buffers) if not torch.equal(graph.weights[n].load(), tuned[n].load())]


def _write(compiled: Compiled, directory: Path, notes: Sequence[str] = ()) -> Written:
    """Write what a compiled model has inserted, and tell of it."""
    compiled.save_adapter(directory)
    (result,) = {id(p.combined): p.combined for p in compiled.plan.entries if p.combined is not None}.values()
    return Written(directory, result.ranks, result.errors, result.held_whole, list(notes))
