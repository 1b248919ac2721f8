"""What an adapter is made of, as plain data: enough to save, load and swap its tensors without the graph."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from adaptc.checkpoint import Checkpoint, load, match
from adaptc.graph import Adaptation, Graph
from adaptc.method import PeftFormat, options_of
from adaptc.peft_keys import PeftLayout, as_stored
from adaptc.registry import method_named
from adaptc.sites import Site


@dataclass(frozen=True)
class AdapterTensor:
    """One trained tensor: its name in the graph, its key in a checkpoint (without PEFT's prefix), its shape."""

    name: str
    key: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class AdapterRecord:
    """One entry of a spec as inserted: enough to save, load and swap its tensors without the graph.

    `modules` and `parameters` are what PEFT would be told to target, `patterns` what adaptc would. `transposed`: some
    weight is stored `(in, out)`. `ambiguous`: a module's name ends another's that is not adapted, so that PEFT's rule
    for lists of names would take both. `in_peft`: PEFT has this method on all of these sites.
    """

    adapter: str
    entry: int
    method: str
    options: Mapping[str, Any]
    modules: tuple[str, ...]
    parameters: tuple[str, ...]
    patterns: tuple[str, ...]
    transposed: bool
    ambiguous: bool
    in_peft: bool
    tensors: tuple[AdapterTensor, ...]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> AdapterRecord:
        """Read what `asdict` wrote."""
        tensors = tuple(AdapterTensor(t["name"], t["key"], tuple(t["shape"])) for t in data["tensors"])
        lists = {key: tuple(data[key]) for key in ("modules", "parameters", "patterns")}
        return cls(**{**data, **lists, "tensors": tensors})

    @property
    def format(self) -> PeftFormat | None:
        """How PEFT spells the method, if it has it on these sites."""
        return method_named(self.method).peft if self.in_peft else None


def records_of(graph: Graph) -> list[AdapterRecord]:
    """What was inserted into a graph, an entry at a time, in order."""
    groups: dict[tuple[int, str, str], list[Adaptation]] = {}
    beside: dict[tuple[int, str], list[Site]] = {}
    for a in graph.adaptations:
        groups.setdefault((a.entry, a.method.name, a.adapter), []).append(a)
        beside.setdefault((a.entry, a.adapter), []).append(a.site)
    found = []
    for (entry, method, adapter), group in groups.items():
        layout = PeftLayout(beside[entry, adapter], places_of(graph))
        own = PeftLayout([a.site for a in group], layout.order)
        in_peft = own.known and all(_in_peft(a, graph) for a in group)
        tensors = tuple(
            AdapterTensor(name, layout.key(a.site, param) if in_peft else a.site.key(param.key), param.shape)
            for a in group
            for name, param in a.params.values()
        )
        modules = tuple(own.modules) or tuple(dict.fromkeys(a.site.module for a in group))
        others = {site.module for site in graph.sites} - {a.site.module for a in group}
        options = json.loads(json.dumps(options_of(group[0].declared), default=list))
        found.append(
            AdapterRecord(
                adapter=adapter,
                entry=entry,
                method=method,
                options=options,
                modules=() if own.parameters and not own.modules else modules,
                parameters=tuple(own.parameters),
                patterns=tuple(dict.fromkeys(a.site.pattern for a in group)),
                transposed=any(a.site.transposed for a in group),
                ambiguous=any(other.endswith("." + module) for other in others for module in modules),
                in_peft=in_peft,
                tensors=tensors,
            )
        )
    return found


def _in_peft(a: Adaptation, graph: Graph) -> bool:
    """Whether PEFT would compute the same from what is stored: it takes no slices, and parameters as they lie."""
    return a.declared.in_peft(a.site) and not a.site.rows and as_stored(a.site, graph).layout == a.site.layout


def places_of(graph: Graph) -> dict[str, int]:
    """Every weight's place in the model."""
    return {name: index for index, name in enumerate(graph.weights)}


def assign(checkpoint: Checkpoint, records: Sequence[AdapterRecord]) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by their names in the graph.

    Raises:
        WeightError: they do not fit the records, or one is not finite.
    """
    tensors = [tensor for record in records for tensor in record.tensors]
    match(checkpoint, {tensor.key: tensor.shape for tensor in tensors})
    values = load(checkpoint, [tensor.key for tensor in tensors])
    return {tensor.name: values[tensor.key] for tensor in tensors}


def as_json(records: Sequence[AdapterRecord]) -> list[dict[str, Any]]:
    """Records as plain data, for a manifest."""
    return [asdict(record) for record in records]


def group(records: Sequence[AdapterRecord]) -> list[list[AdapterRecord]]:
    """Records that share a checkpoint, in the order they apply: a method, and what joins its configuration.

    A method cannot join one that sits on the same modules: there the order of both must be kept.
    """
    groups: list[list[AdapterRecord]] = []
    joining = [record for record in records if record.format is not None and record.format.joins]
    for record in records:
        if record not in joining:
            groups.append([record])
    for record in joining:
        host = next((g for g in groups if _hosts(g[0], record)), None)
        if host is None:
            groups.append([record])
        else:
            host.append(record)
    return sorted(groups, key=lambda members: members[0].entry)


def _hosts(host: AdapterRecord, record: AdapterRecord) -> bool:
    known = host.format is not None and host.format.type is not None
    apart = host.entry == record.entry or not set(host.modules) & set(record.modules)
    return known and host.adapter == record.adapter and apart
