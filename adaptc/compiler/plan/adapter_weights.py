"""The weights of trained adapters: read from their checkpoints into the graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from adaptc.checkpoints.adapter_checks import check_base, check_base_weights
from adaptc.checkpoints.graph_records import records_of
from adaptc.checkpoints.records import AdapterRecord, assign
from adaptc.compiler.plan.adapters import PlannedInsertion
from adaptc.errors import WeightError
from adaptc.ir.graph import Graph
from adaptc.spec.spec import Spec
from adaptc.weights import Deferred, Weight


def load_checkpoints(spec: Spec, entries: Sequence[PlannedInsertion], base: Graph, adapted: Graph) -> None:
    """Give the adapters of a graph the weights of the checkpoints that the spec names.

    Args:
        spec: the spec, whose lines errors quote.
        entries: what was inserted, and from which checkpoint.
        base: the traced graph; its hash is computed only where a checkpoint names the base it was trained on.
        adapted: the adapted graph, whose weights are set.

    Raises:
        WeightError: a checkpoint does not fit the model, or was trained on another base.
    """
    inserted = records_of(adapted)
    by_path: dict[Path, list[PlannedInsertion]] = {}
    for planned in entries:
        if planned.checkpoint is not None:
            by_path.setdefault(planned.checkpoint.path, []).append(planned)
    for members in by_path.values():
        checkpoint = members[0].checkpoint
        assert checkpoint is not None
        wanted = {(p.entry, p.insert.method.name, p.insert.adapter): p for p in members}
        records = [(r, p) for r in inserted if (p := wanted.get((r.entry, r.method, r.adapter))) is not None]
        try:
            if checkpoint.base_sha256:
                check_base(checkpoint, base.base_sha256)
            check_base_weights(checkpoint, base.weights)
            values = assign(checkpoint, [_as_stored(adapted, r, p) for r, p in records])
        except WeightError as error:
            raise spec.weight_error((*spec.place(members[0].entry), "adapter"), error) from None
        for record, planned in records:
            if planned.whole is not None:
                method = planned.insert.method
                cut = {site: method.cut_tensors(theta) for site, theta in record.sites(values).items()}
                values |= record.by_name(cut)
        for name, value in values.items():
            put_weight(adapted.weights[name], value.detach)
    for planned in entries:
        for adaptation in (a for a in adapted.adaptations if a.entry == planned.entry):
            starts = planned.starts.get(adaptation.site.pattern, {})
            for argument, (name, _) in adaptation.params.items():
                if argument in starts:
                    put_weight(adapted.weights[name], starts[argument].load)


def _as_stored(adapted: Graph, record: AdapterRecord, planned: PlannedInsertion) -> AdapterRecord:
    """A record with its checkpoint's shapes, which are larger where it is inserted at a smaller rank."""
    whole = planned.whole
    if whole is None:
        return record
    members = [a for a in adapted.adaptations if (a.entry, a.method.name) == (record.entry, record.method)]
    shapes = {
        name: whole.at(a.site).stored(a.site)[argument].shape
        for a in members
        for argument, (name, _) in a.params.items()
    }
    return record.with_shapes(shapes)


def put_weight(weight: Weight, value: Callable[[], torch.Tensor]) -> None:
    """Let an adapter's weight be loaded by calling `value`."""
    assert isinstance(weight, Deferred)
    weight.put(value)
