"""What an adapter is made of, as plain data: enough to save, load and swap its tensors without the graph."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from pydantic import TypeAdapter

from adaptc.checkpoints.adapter import ROOT, Checkpoint
from adaptc.checkpoints.adapter_checks import load, match
from adaptc.checkpoints.peft_keys import PeftLayout
from adaptc.ir.adaptation import Adaptation
from adaptc.ir.graph import Graph
from adaptc.ir.selection import as_stored
from adaptc.methods.method import METHODS, Method, options_of, shared_name
from adaptc.methods.param import Param
from adaptc.methods.peft_format import PeftFormat
from adaptc.methods.point_sites import Site
from adaptc.methods.site import MATRIX_KINDS, WeightSite
from adaptc.methods.virtual_tokens import PROMPT_KEY, PromptMethod


@dataclass(frozen=True)
class AdapterTensor:
    """One tensor of an adapter.

    Attributes:
        name: its name in the graph.
        key: its key in a checkpoint, without PEFT's prefix; see `checkpoint.spelled`.
        shape: its shape.
        argument: what the method's expression calls it.
        site: the site it belongs to, by its pattern, or the parameter's name; "" for one that all of them share.
        trained: whether it gets a gradient.
        stored: whether checkpoints hold it.
        below: of indices what all of them are below.
    """

    name: str
    key: str
    shape: tuple[int, ...]
    argument: str
    site: str
    trained: bool
    stored: bool
    below: int | None


@dataclass(frozen=True)
class AdapterRecord:
    """One entry of a spec as inserted: enough to save, load and swap its tensors without the graph.

    `modules` and `parameters` are what PEFT would be told to target, `patterns` what adaptc would. `transposed`: some
    weight is stored `(in, out)`. `ambiguous`: a module's name ends another's that is not adapted, so that PEFT's rule
    for lists of names would take both. `in_peft`: PEFT has this method on all of these sites. `sizes`: what PEFT's
    configuration says of the sites. `heads`: the base's tensors that PEFT expects beside it where the task is to
    classify.
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
    sizes: Mapping[str, int]
    heads: tuple[str, ...]
    tensors: tuple[AdapterTensor, ...]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> AdapterRecord:
        """Read what `asdict` wrote."""
        tensors = tuple(AdapterTensor(**{**t, "shape": tuple(t["shape"])}) for t in data["tensors"])
        lists = {key: tuple(data[key]) for key in ("modules", "parameters", "patterns", "heads")}
        return cls(**{**data, **lists, "tensors": tensors})

    @property
    def stored(self) -> list[AdapterTensor]:
        """The tensors that checkpoints hold."""
        return [tensor for tensor in self.tensors if tensor.stored]

    @property
    def instance(self) -> Method:
        """The method with the options of the entry."""
        return TypeAdapter(METHODS[self.method]).validate_python(dict(self.options))

    def sites(self, values: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
        """Of these tensors by name, those of every site, as the method's expression calls them."""
        found: dict[str, dict[str, torch.Tensor]] = {}
        for tensor in self.tensors:
            if tensor.site and tensor.name in values:
                found.setdefault(tensor.site, {})[tensor.argument] = values[tensor.name]
        return found

    def renamed(self, sites: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """The inverse of `sites`."""
        own = [t for t in self.tensors if t.argument in sites.get(t.site, {})]
        return {tensor.name: sites[tensor.site][tensor.argument] for tensor in own}

    def shaped(self, shapes: Mapping[str, tuple[int, ...]]) -> AdapterRecord:
        """The record with other shapes, by name."""
        return replace(
            self, tensors=tuple(replace(t, shape=shapes.get(t.name, t.shape)) for t in self.tensors)
        )

    @property
    def format(self) -> PeftFormat[Any] | None:
        """How PEFT spells the method, if it has it on these sites."""
        return METHODS[self.method].peft if self.in_peft else None


def records_of(graph: Graph) -> list[AdapterRecord]:
    """What was inserted into a graph, an entry at a time, in order."""
    groups: dict[tuple[int, str, str], list[Adaptation]] = {}
    beside: dict[tuple[int, str], list[Site]] = {}
    for a in graph.adaptations:
        groups.setdefault((a.entry, a.method.name, a.adapter), []).append(a)
        beside.setdefault((a.entry, a.adapter), []).append(a.site)
    found = []
    for (entry, method, adapter), group in groups.items():
        layout = PeftLayout(beside[entry, adapter], weight_order(graph))
        own = PeftLayout([a.site for a in group], layout.order)
        every = sum(point.kind == group[0].site.kind for point in graph.points) if group[0].stays else 0
        declared, format = group[0].declared, group[0].declared.peft
        sizes = format.sizes(declared, [a.site for a in group], every) if format is not None else {}
        in_peft = own.known and sizes is not None and all(_in_peft(a, graph) for a in group)
        tensors = {
            name: AdapterTensor(
                name, key, param.shape, argument, site, param.trained, param.stored, param.below
            )
            for a in group
            for argument, (name, param) in a.params.items()
            for key, site in [_place(a.site, param, a.shares(argument), layout if in_peft else None)]
        }
        modules = tuple(own.modules) or tuple(dict.fromkeys(a.site.module for a in group))
        others = {site.module for site in graph.sites} - {a.site.module for a in group}
        found.append(
            AdapterRecord(
                adapter=adapter,
                entry=entry,
                method=method,
                options=_plain(group[0].declared),
                modules=() if own.parameters and not own.modules else modules,
                parameters=tuple(own.parameters),
                patterns=tuple(dict.fromkeys(a.site.pattern for a in group)),
                transposed=any(isinstance(a.site, WeightSite) and a.site.transposed for a in group),
                ambiguous=any(other.endswith("." + module) for other in others for module in modules),
                in_peft=in_peft,
                sizes=sizes or {},
                heads=_heads(graph, group[0].declared) if in_peft else (),
                tensors=tuple(tensors.values()),
            )
        )
    return found


def _heads(graph: Graph, method: Method) -> tuple[str, ...]:
    """The base's own tensors in modules that PEFT saves along, but for those that are adapted, in whichever entry."""
    wanted = method.peft.heads if method.peft is not None else frozenset()
    adapted = {a.site.parameter for a in graph.adaptations}
    held = [
        n for n in graph.weights if n not in graph.inserted and n not in graph.buffers and n not in adapted
    ]
    return tuple(name for name in held if not wanted.isdisjoint(name.split(".")))


def _plain(method: Method) -> dict[str, Any]:
    return json.loads(json.dumps(options_of(method), default=list))


def compacted(
    records: Sequence[AdapterRecord], values: Mapping[str, torch.Tensor]
) -> tuple[list[AdapterRecord], dict[str, torch.Tensor]]:
    """Records and their tensors, without what training has pruned."""
    found, kept = [], dict(values)
    for record in records:
        sites, instance = record.sites(values), record.instance
        if isinstance(instance, PromptMethod):
            plain, tokens = _plain_tokens(record, instance, values)
            found.append(plain)
            kept |= tokens
            continue
        smaller, left = instance.compact(sites)
        if smaller is instance:
            found.append(record)
            continue
        new = record.renamed(left)
        shapes = {name: tuple(value.shape) for name, value in new.items()}
        found.append(replace(record.shaped(shapes), options=_plain(smaller)))
        kept |= new
    return found, kept


def _plain_tokens(
    record: AdapterRecord, method: PromptMethod, values: Mapping[str, torch.Tensor]
) -> tuple[AdapterRecord, dict[str, torch.Tensor]]:
    """Virtual tokens as they are saved: without what makes them."""
    if method.plain == method:
        return record, {}
    with torch.no_grad():
        made = method.tokens(**{t.argument: values[t.name] for t in record.tensors})
    name = shared_name(record.adapter, PROMPT_KEY)
    tokens = AdapterTensor(name, ROOT + PROMPT_KEY, tuple(made.shape), "tokens", "", True, True, None)
    return replace(record, options=_plain(method.plain), tensors=(tokens,)), {name: made}


def _place(site: Site, param: Param, shared: bool, layout: PeftLayout | None) -> tuple[str, str]:
    """The key of a tensor, and the site it belongs to."""
    if shared:
        return f"{ROOT}{param.key}", ""
    key = layout.key(site, param) if layout is not None else site.key(param.key)
    return key, site.pattern if site.kind in MATRIX_KINDS else site.name


def _in_peft(a: Adaptation, graph: Graph) -> bool:
    """Whether PEFT would compute the same from what is stored: it takes no slices, and parameters as they lie."""
    if not a.declared.in_peft(a.site):
        return False
    site = a.site
    return not isinstance(site, WeightSite) or (
        not site.rows and as_stored(site, graph).layout == site.layout
    )


def weight_order(graph: Graph) -> dict[str, int]:
    """Every weight's place in the model."""
    return {name: index for index, name in enumerate(graph.weights)}


def assign(checkpoint: Checkpoint, records: Sequence[AdapterRecord]) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by their names in the graph.

    Raises:
        WeightError: they do not fit the records, or one is not finite.
    """
    tensors = [tensor for record in records for tensor in record.stored]
    expected = {tensor.key: tensor for tensor in tensors}
    match(checkpoint, expected)
    values = load(checkpoint, expected)
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
    if host.format is None or host.format.type is None:
        return False
    heads = all(not host.format.heads.isdisjoint(module.split(".")) for module in record.modules)
    known = host.format.hosts or (bool(host.format.heads) and heads)
    apart = host.entry == record.entry or not set(host.modules) & set(record.modules)
    return known and host.adapter == record.adapter and apart
