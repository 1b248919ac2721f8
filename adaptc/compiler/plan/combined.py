"""An entry that combines adapters: what it inserts, and from which tensors that starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from adaptc.arithmetic.change import changes_of
from adaptc.arithmetic.combined import Origin, combined, product_methods
from adaptc.arithmetic.layers import Part, PartError
from adaptc.arithmetic.merging import Merge
from adaptc.checkpoints.adapter import Checkpoint
from adaptc.compiler.plan.adapters import PlannedInsertion
from adaptc.errors import WeightError, unknown
from adaptc.ir.graph import Graph
from adaptc.methods.method import METHODS
from adaptc.spec.entries import CombineEntry
from adaptc.spec.spec import Spec

Adapted = Callable[[Spec], tuple[Graph, Sequence[Checkpoint]]]
"""Gives the base with the adapter of a spec's only entry, its tensors to be read late, and its checkpoints."""


def combined_entry(
    spec: Spec, graph: Graph, index: int, entry: CombineEntry, adapted: Adapted
) -> list[PlannedInsertion]:
    """The methods that an entry which combines adapters inserts.

    Args:
        spec: the spec.
        graph: the traced graph.
        index: the number of the entry.
        entry: the entry.
        adapted: plans and inserts one adapter.

    Raises:
        SpecError: an adapter changes no weights, or cannot be combined so.
        WeightError: an adapter cannot be read, or two were trained on two bases.
    """
    place = (*spec.place(index), "combine")
    parts: list[Part] = []
    read: list[Checkpoint] = []
    origins: list[Origin] = []
    for number, member in enumerate(entry.combine):
        inserted, checkpoints = adapted(spec.alone(member.entry, (*place, number)))
        if inserted.staying:
            message = f"{inserted.staying} changes no weight, so nothing of it can be combined"
            raise spec.error(
                (*place, number, "adapter"), message, "leave it out, or write it as an entry of its own"
            )
        read += checkpoints
        _check_same_base(spec, (*place, number, "adapter"), read)
        parts.append(Part(member.weight, inserted, changes_of(graph, inserted)))
        origins += [Origin(member.adapter, c.path, c.sha256, member.weight) for c in checkpoints]
    methods = product_methods()
    if entry.to is not None and entry.to not in methods:
        message = (
            unknown("method", entry.to, sorted(METHODS))
            if entry.to not in METHODS
            else (f"{entry.to} cannot hold what other methods do; methods that can: {', '.join(methods)}")
        )
        raise spec.error((*spec.place(index), "to"), message)
    cls = methods[entry.to] if entry.to is not None else None
    merge = Merge(entry.how, 1.0 if entry.density is None else entry.density, entry.majority_sign_method)
    try:
        result = combined(graph, parts, merge, entry.svd_rank, cls, spec.seed)
    except PartError as error:
        where = place[:-1] if error.part is None else (*place, error.part, "adapter")
        raise spec.error(where, error.message, *error.notes) from None
    result.origins = origins
    name = entry.name or spec.default_name(index)
    starts = result.starts()
    return [
        PlannedInsertion(index, item, item.selection(graph), starts=starts, combined=result)
        for item in result.inserts(name, index, entry.on_alias)
    ]


def _check_same_base(spec: Spec, place: tuple[str | int, ...], checkpoints: Sequence[Checkpoint]) -> None:
    """Check that adapters which name their base name the same one.

    Raises:
        WeightError: two differ.
    """
    named = [checkpoint for checkpoint in checkpoints if checkpoint.base_sha256]
    for checkpoint in named[1:]:
        if checkpoint.base_sha256 != named[0].base_sha256:
            message = (
                f"{checkpoint.path} was trained on another base than {named[0].path}: SHA-256 "
                f"{checkpoint.base_sha256} and {named[0].base_sha256}"
            )
            raise spec.weight_error(place, WeightError(message))
