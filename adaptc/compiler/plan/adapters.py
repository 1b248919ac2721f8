"""The adapters of a plan: from the entries of `adapt` to methods on sites, with the checkpoints of trained ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from adaptc.arithmetic.combined import Combined
from adaptc.checkpoints.adapter import Checkpoint, directories, of_name, read, why_missing
from adaptc.checkpoints.adapter_checks import match
from adaptc.checkpoints.asked_for import Layers
from adaptc.checkpoints.config_file import CONFIG, config_error
from adaptc.checkpoints.config_keys import ignoring
from adaptc.checkpoints.earlier_names import with_names_of_base
from adaptc.checkpoints.graph_records import weight_order
from adaptc.checkpoints.joined import joined_methods
from adaptc.checkpoints.key_parts import ROOT, modules_holding
from adaptc.checkpoints.lengthened_keys import shortened
from adaptc.checkpoints.peft_config import declared
from adaptc.checkpoints.peft_keys import PeftLayout
from adaptc.checkpoints.peft_targets import named_modules
from adaptc.checkpoints.saved_along import with_base_tensors
from adaptc.checkpoints.tied import tied_in, tying_key
from adaptc.checkpoints.whole_modules import check_whole_modules, with_state
from adaptc.compiler.plan.texts import tokenized
from adaptc.errors import InputError, WeightError
from adaptc.ir.adaptation import OnAlias
from adaptc.ir.aliases import alias_names, unread_modules
from adaptc.ir.graph import Graph
from adaptc.ir.selection import Selection, Target
from adaptc.methods.method import METHODS, Method
from adaptc.methods.param import Param
from adaptc.methods.site import ATTENTION, MATRIX_KINDS, WeightSite
from adaptc.patterns import literal
from adaptc.rewriter.insert.base import Insert
from adaptc.spec.entries import AdapterEntry, MethodEntry
from adaptc.spec.spec import Spec, resolve_path
from adaptc.tracing.huggingface.module import pretrained
from adaptc.weights import Weight


@dataclass(frozen=True)
class PlannedInsertion:
    """One method to insert, from an entry of the spec or from a checkpoint that an entry names.

    Attributes:
        entry: the number of the entry.
        insert: the pass that inserts it.
        selection: the sites that its target matches.
        checkpoint: the checkpoint that holds its weights, if it is trained.
        whole: the method at the checkpoint's rank, where it is inserted at a smaller one.
        starts: pattern of a site -> argument of the method's expression -> the tensor that it starts from: an
            earlier adapter's, or what several combine to.
        combined: what it is a part of, where an entry combines adapters.
    """

    entry: int
    insert: Insert[Any, Any]
    selection: Selection[Any]
    checkpoint: Checkpoint | None = None
    whole: Method[Any] | None = None
    starts: Mapping[str, Mapping[str, Weight]] = field(default_factory=dict[str, Mapping[str, Weight]])
    combined: Combined | None = None

    @property
    def stored_as(self) -> Method[Any]:
        """The method at the rank that the checkpoint has."""
        return self.whole or self.insert.method


@dataclass(frozen=True)
class _Common:
    """The options of `Insert` that all methods of one entry share."""

    adapter: str
    entry: int
    seed: int
    on_alias: OnAlias

    def insert(self, method: Method[Any], target: Target, **options: Any) -> Insert[Any, Any]:
        """The pass that inserts a method with these options."""
        return Insert(method, target=target, **vars(self), **options)


def entries_of(spec: Spec, graph: Graph, index: int) -> list[PlannedInsertion]:
    """The methods that one entry of `adapt` inserts.

    Raises:
        SpecError: there is no checkpoint at its path, or no calibration data for a method that chooses by data.
        WeightError: the checkpoint cannot be read.
    """
    entry = spec.adapt[index]
    if isinstance(entry, AdapterEntry):
        return _trained(spec, graph, index, entry)
    assert isinstance(entry, MethodEntry)
    common = _Common(entry.name, index, spec.seed, entry.on_alias)
    item = common.insert(entry.build(), entry.target, exclude=entry.exclude)
    if item.method.calibrated:
        item = _calibrated(spec, graph, index, item)
    item = tokenized(spec, graph, index, item)
    first = PlannedInsertion(index, item, item.selection(graph))
    return [first, *_biases(graph, first, common)]


def _calibrated(spec: Spec, graph: Graph, index: int, item: Insert[Any, Any]) -> Insert[Any, Any]:
    """The pass with its method's choices made by the graph's Fisher information; a plan alone makes none.

    Raises:
        SpecError: there is no calibration data.
    """
    if graph.fisher_information is None:
        if spec.calibration is None:
            message = f"{item.method.name} chooses by data, and there is none"
            advice = "name some: `calibration: rows.jsonl`, inputs with labels"
            raise spec.error(spec.place(index), message, advice)
        return item
    sites = item.selection(graph).sites
    information = graph.fisher_information.of(site.parameter for site in sites)
    by_site = {site.name: information[site.parameter] for site in sites}
    return replace(item, method=item.method.calibrate(by_site))


def _trained(spec: Spec, graph: Graph, index: int, entry: AdapterEntry) -> list[PlannedInsertion]:
    """The methods that an entry's checkpoints declare.

    Raises:
        SpecError: there is no checkpoint at its path, or its rank cannot be cut.
        WeightError: a checkpoint cannot be read.
    """
    place, path = (*spec.place(index), "adapter"), resolve_path(spec, entry.adapter)
    path = of_name(path, entry.name or spec.default_name(index))
    absent = why_missing(path)
    if absent:
        raise spec.error(place, absent)
    planned: list[PlannedInsertion] = []
    modules, unread = modules_holding(graph.weights), unread_modules(graph.module)
    try:
        for stored in _read(spec, index, entry, path):
            named = with_names_of_base(shortened(stored, modules), pretrained(graph.source.model), modules)
            checkpoint = replace(named, unread=unread)
            check_whole_modules(checkpoint, modules)
            name = entry.name or (stored.path.name if stored.path != path else spec.default_name(index))
            common = _Common(name, index, spec.seed, entry.on_alias)
            planned += _from_checkpoint(graph, checkpoint, common, entry.r)
    except WeightError as error:
        raise spec.weight_error(place, error) from None
    except InputError as error:
        raise spec.error((*spec.place(index), "r"), error.message, *error.notes) from None
    return planned


def _read(spec: Spec, index: int, entry: AdapterEntry, path: Path) -> list[Checkpoint]:
    """The checkpoints at the path of an entry, without the options that it ignores.

    Raises:
        SpecError: no configuration has such an option.
        WeightError: a checkpoint cannot be read.
    """
    checkpoints = [read(directory, entry.allow_pickle) for directory in directories(path)]
    try:
        return ignoring(checkpoints, entry.ignore)
    except WeightError as error:
        raise spec.error((*spec.place(index), "ignore"), error.message, *error.notes) from None


def _from_checkpoint(
    graph: Graph, checkpoint: Checkpoint, common: _Common, rank: int | None
) -> list[PlannedInsertion]:
    """The method that a checkpoint declares, and the parameters that it holds whole.

    Raises:
        InputError: the method cannot be cut to `rank`.
        WeightError: the checkpoint cannot be read, or holds what no change of a layer's own weight computes.
    """
    declaration = declared(checkpoint)
    cls, options = declaration.method, declaration.options
    stated = common.on_alias
    common = replace(common, on_alias=_on_alias(checkpoint, graph, cls, stated))
    item = common.insert(
        cls(**options),
        declaration.target,
        exclude=declaration.exclude,
        as_stored=declaration.as_stored,
        trained=True,
        every=cls.peft is not None and cls.peft.any_module and not checkpoint.in_adaptc_format,
    )
    if not checkpoint.in_adaptc_format and any(
        site.type == ATTENTION for site in item.selection(graph).sites
    ):
        assert cls.peft is not None
        item = replace(item, method=cls(**cls.peft.computed(options, named_modules(checkpoint))))
    whole: Method[Any] = item.method
    if rank is not None:
        item = replace(item, method=_cut(whole, rank))
    stored = whole if rank is not None else None
    first = PlannedInsertion(common.entry, item, item.selection(graph), checkpoint, stored)
    if not checkpoint.in_adaptc_format:
        _check_sizes(graph, first, checkpoint)
    grouped = [
        s
        for s in first.selection.sites
        if isinstance(s, WeightSite) and s.groups > 1 and not item.method.in_peft(s)
    ]
    if grouped and not checkpoint.in_adaptc_format:
        raise WeightError(
            f"{checkpoint.path}: PEFT's {item.method.name} on the grouped convolution {grouped[0].module} reaches "
            "across groups, which no change of that layer's own weight does; train it without that layer, or by adaptc"
        )
    joined: list[PlannedInsertion] = []
    if checkpoint.saved_modules:
        target = [literal(module) for module in checkpoint.saved_modules]
        joined.append(_apart(graph, _whole(graph, first, target, common)))
    before = _beside(graph, first, checkpoint, replace(common, on_alias=stated))
    return _with_base_tensors(graph, [*before, first, *_biases(graph, first, common), *joined], common)


def _check_sizes(graph: Graph, planned: PlannedInsertion, checkpoint: Checkpoint) -> None:
    """Check the sizes of the base that a configuration states.

    Raises:
        WeightError: the base has others.
    """
    sites, format = planned.selection.sites, planned.insert.method.peft
    if not sites or format is None:
        return
    every = sum(point.kind == sites[0].kind for point in graph.points)
    sizes: dict[str, int] = format.sizes(planned.insert.method, sites, every) or {}
    for key, size in sizes.items():
        value = checkpoint.config.get(key)
        if value not in (None, size):
            raise config_error(
                checkpoint.path / CONFIG, (key,), f"expected {size}, as this base has, got {value}"
            )


def _beside(
    graph: Graph, host: PlannedInsertion, checkpoint: Checkpoint, common: _Common
) -> list[PlannedInsertion]:
    """The methods that a checkpoint holds under keys of their own beside the one that it is of.

    Raises:
        WeightError: the tensors of a module that the configuration names are missing.
    """
    format = host.insert.method.peft
    if checkpoint.in_adaptc_format or format is None:
        return []
    planned: list[PlannedInsertion] = []
    for joined in joined_methods(checkpoint, format):
        cls = joined.method
        assert cls.peft is not None
        tied = [
            name.rpartition(".")[0]
            for module in joined.modules
            if f"{module}.weight" in graph.aliases
            for name in alias_names(graph, f"{module}.weight")
        ]
        covered = (*joined.modules, *tied)
        missing = [name for name in joined.names if not any(m.endswith(name) for m in covered)]
        if missing or not joined.modules:
            raise config_error(
                checkpoint.path / CONFIG,
                (str(cls.peft.joins),),
                f"the file holds no tensors of {', '.join(missing) or 'any module'} for it; it is incomplete",
            )
        shared = replace(common, on_alias=_on_alias(checkpoint, graph, cls, common.on_alias))
        item = shared.insert(cls(**joined.options), joined.modules, trained=True)
        planned.append(PlannedInsertion(host.entry, item, item.selection(graph), checkpoint))
    return planned


def _with_base_tensors(
    graph: Graph, members: Sequence[PlannedInsertion], common: _Common
) -> list[PlannedInsertion]:
    """The methods of a checkpoint, behind one that puts in place what it holds of the base and differs from it."""
    checkpoint = members[0].checkpoint
    assert checkpoint is not None
    base = {site.name: graph.weights[site.parameter] for site in graph.sites}
    state = {name: graph.weights[name] for name in graph.buffers}
    checkpoint = with_base_tensors(with_state(checkpoint, state), _expected(graph, members), base)
    planned = [replace(member, checkpoint=checkpoint) for member in members]
    if not checkpoint.changed:
        return planned
    target = [literal(name) for name in checkpoint.changed.values()]
    return [_whole(graph, planned[0], target, replace(common, on_alias="share")), *planned]


def _on_alias(checkpoint: Checkpoint, graph: Graph, cls: type[Method[Any]], stated: OnAlias) -> OnAlias:
    """What is done about tied tensors: what the entry states, unless the checkpoint was trained with them tied.

    Raises:
        WeightError: the entry states what would change one of them without the other.
    """
    tied = tied_in(checkpoint, graph.aliases)
    if tied and stated not in ("refuse", "share"):
        raise WeightError(
            f"{checkpoint.path}: trained with {tying_key(checkpoint)}, so that {' and '.join(tied)} change together; "
            f"on_alias: {stated} would change one of them alone",
            "write on_alias: share, or leave it out",
        )
    ties_itself = cls.peft is not None and cls.peft.tied and stated == "refuse"
    return "share" if tied or ties_itself else stated


def _cut(method: Method[Any], rank: int) -> Method[Any]:
    """The method at a smaller rank.

    Raises:
        InputError: its ranks are not nested, or it has no more ranks than asked for.
    """
    largest: int | None = getattr(method, "r", None)
    cut = method.cut(rank)
    if cut is None:
        nested = [name for name, cls in METHODS.items() if cls.cut is not Method[Any].cut]
        raise InputError(
            f"the ranks of {method.name} are not nested, as those of {', '.join(nested)} are: leave r out"
        )
    if largest is not None and rank > largest:
        raise InputError(f"the adapter has ranks up to {largest}, got {rank}")
    return cut


def _whole(
    graph: Graph, host: PlannedInsertion, target: Target, common: _Common, **options: Any
) -> PlannedInsertion:
    """Parameters trained whole beside a method: PEFT's `modules_to_save`, and the biases of `bias`."""
    cls = next(c for c in METHODS.values() if c.peft is not None and c.peft.joins == "modules_to_save")
    item = common.insert(cls(**options), target)
    return PlannedInsertion(host.entry, item, item.selection(graph), host.checkpoint)


def _apart(graph: Graph, whole: PlannedInsertion) -> PlannedInsertion:
    """Whole modules, each with a tensor of its own if they are all that share one: PEFT trains them apart."""
    saved = {site.name for site in whole.selection.sites}
    tied = [{*alias_names(graph, name)} for name in saved]
    apart = all(names <= saved for names in tied) and any(len(names) > 1 for names in tied)
    if whole.insert.on_alias != "refuse" or not apart:
        return whole
    return replace(whole, insert=replace(whole.insert, on_alias="untie"))


def _biases(graph: Graph, host: PlannedInsertion, common: _Common) -> list[PlannedInsertion]:
    """The biases that a low-rank method's option `bias` trains: those of the layers it adapts, or all."""
    which = getattr(host.insert.method, "biases", "none")
    if which == "none":
        return []
    adapted = tuple(dict.fromkeys(literal(site.module) for site in host.selection.sites))
    target = adapted if which == "lora_only" else ("*",)
    biases = _whole(graph, host, target, common, parameters=("bias",))
    return [biases] if biases.selection.sites else []


def match_checkpoints(spec: Spec, graph: Graph, entries: Sequence[PlannedInsertion]) -> None:
    """Check the keys and shapes of every checkpoint against the parameters that will be inserted for it.

    Raises:
        WeightError: they do not match.
    """
    layers = Layers(modules_holding(graph.weights), _table_sizes(graph))
    for path in dict.fromkeys(p.checkpoint.path for p in entries if p.checkpoint is not None):
        members = [p for p in entries if p.checkpoint is not None and p.checkpoint.path == path]
        checkpoint = members[0].checkpoint
        assert checkpoint is not None
        try:
            match(checkpoint, _expected(graph, members), layers)
        except WeightError as error:
            raise spec.weight_error((*spec.place(members[0].entry), "adapter"), error) from None


def _expected(graph: Graph, members: Sequence[PlannedInsertion]) -> dict[str, Param]:
    """What a checkpoint must hold for the methods that it declares: key without PEFT's prefix -> parameter."""
    checkpoint = members[0].checkpoint
    assert checkpoint is not None
    layout = PeftLayout([site for p in members for site in p.selection.sites], weight_order(graph))
    expected: dict[str, Param] = {}
    for planned in members:
        method, sites = planned.stored_as, planned.selection.sites
        for site in sites:
            for param in method.at(site).stored(site).values():
                key = site.key(param.key) if checkpoint.in_adaptc_format else layout.key(site, param)
                expected[key] = param
        shared = method.shared(sites) if sites else {}
        expected |= {f"{ROOT}{param.key}": param for param in shared.values()}
    return {key: param for key, param in expected.items() if param.stored}


def _table_sizes(graph: Graph) -> dict[str, int]:
    """The modules whose size is that of the vocabulary -> the entries it has."""
    tables = {site.module: site.in_features for site in graph.sites if site.kind == "embedding"}
    heads = {
        s.module: s.out_features
        for s in graph.sites
        if s.module in graph.output_heads and s.kind in MATRIX_KINDS
    }
    return tables | {module: size for module, size in heads.items() if size in tables.values()}
