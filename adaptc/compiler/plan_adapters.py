"""From the entries of a spec to what is inserted: methods on sites, and the checkpoints of trained ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from adaptc.checkpoints.adapter import ROOT, Checkpoint, directories, read, why_missing
from adaptc.checkpoints.adapter_checks import match
from adaptc.checkpoints.graph_records import weight_order
from adaptc.checkpoints.peft_config import declared
from adaptc.checkpoints.peft_keys import PeftLayout
from adaptc.checkpoints.peft_targets import named_modules
from adaptc.errors import InputError, WeightError
from adaptc.ir.graph import Graph
from adaptc.ir.selection import Selection
from adaptc.methods.method import METHODS, Method
from adaptc.methods.param import Param
from adaptc.methods.site import ATTENTION, WeightSite
from adaptc.methods.virtual_tokens import InputMethod
from adaptc.rewriter.insert.base import Insert
from adaptc.spec.entries import AdapterEntry
from adaptc.spec.spec import Spec, resolve_path


@dataclass(frozen=True)
class PlannedInsertion:
    """One thing to insert: from an entry of the spec, or from a checkpoint that an entry names."""

    entry: int
    insert: Insert
    selection: Selection[Any]
    checkpoint: Checkpoint | None = None
    whole: Method | None = None
    """The method at the rank its checkpoint has, where it is inserted at a smaller one."""

    @property
    def stored_as(self) -> Method:
        """The method as the checkpoint holds it."""
        return self.whole or self.insert.method


def entries_of(spec: Spec, graph: Graph, index: int) -> list[PlannedInsertion]:
    """What one entry of `adapt` inserts.

    Raises:
        SpecError: there is no checkpoint where it says.
        WeightError: the checkpoint cannot be read.
    """
    entry = spec.adapt[index]
    if isinstance(entry, AdapterEntry):
        return _trained(spec, graph, index, entry)
    common = {"adapter": entry.name, "entry": index, "seed": spec.seed, "on_alias": entry.on_alias}
    item = Insert(entry.build(), target=entry.target, exclude=entry.exclude, **common)
    if item.method.calibrated:
        item = _calibrated(spec, graph, index, item)
    item = with_words(spec, graph, index, item)
    first = PlannedInsertion(index, item, item.selection(graph))
    return [first, *_biases(graph, first, common)]


def _calibrated(spec: Spec, graph: Graph, index: int, item: Insert) -> Insert:
    """What is inserted, with what data decides decided; a plan alone reads none."""
    if graph.information is None:
        if spec.calibration is None:
            words = f"{item.method.name} chooses by data, and there is none"
            raise spec.error(
                ("adapt", index), words, "name some: `calibration: rows.jsonl`, inputs with labels"
            )
        return item
    found = graph.information.of(site.parameter for site in item.selection(graph).sites)
    by_site = {site.name: found[site.parameter] for site in item.selection(graph).sites}
    return replace(item, method=item.method.calibrate(by_site))


def _trained(spec: Spec, graph: Graph, index: int, entry: AdapterEntry) -> list[PlannedInsertion]:
    place, path = ("adapt", index, "adapter"), resolve_path(spec, entry.adapter)
    absent = why_missing(path)
    if absent:
        raise spec.error(place, absent)
    found: list[PlannedInsertion] = []
    try:
        for directory in directories(path):
            checkpoint = read(directory, entry.allow_pickle)
            name = entry.name or (directory.name if directory != path else "default")
            common = {"adapter": name, "entry": index, "seed": spec.seed, "on_alias": entry.on_alias}
            found += _from_checkpoint(graph, checkpoint, common, entry.r)
    except WeightError as error:
        raise spec.weight_error(place, error) from None
    except InputError as error:
        raise spec.error((*place[:2], "r"), str(error)) from None
    return found


def _from_checkpoint(
    graph: Graph, checkpoint: Checkpoint, common: dict[str, Any], rank: int | None
) -> list[PlannedInsertion]:
    what = declared(checkpoint)
    if what.method.peft is not None and what.method.peft.tied and common["on_alias"] == "refuse":
        common = common | {"on_alias": "share"}
    chosen = {"target": what.target, "exclude": what.exclude, "as_stored": what.as_stored, "trained": True}
    item = Insert(what.method(**what.options), **common, **chosen)
    if not checkpoint.in_adaptc_format and any(
        site.type == ATTENTION for site in item.selection(graph).sites
    ):
        assert what.method.peft is not None
        options = what.method.peft.computed(what.options, named_modules(checkpoint))
        item = replace(item, method=what.method(**options))
    whole = None
    if rank is not None:
        whole = item.method
        item = replace(item, method=_cut(whole, rank))
    first = PlannedInsertion(common["entry"], item, item.selection(graph), checkpoint, whole)
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
    joined = []
    if checkpoint.saved_modules:
        target = [pattern for module in checkpoint.saved_modules for pattern in (module, f"*.{module}")]
        joined.append(_whole(graph, first, target, common))
    return [first, *_biases(graph, first, common), *joined]


def _cut(method: Method, rank: int) -> Method:
    """The method at a smaller rank.

    Raises:
        InputError: its ranks are not nested, or there are fewer.
    """
    largest: int | None = getattr(method, "r", None)
    cut = method.cut(rank)
    if cut is None:
        nested = [name for name, cls in METHODS.items() if cls.cut is not Method.cut]
        raise InputError(
            f"the ranks of {method.name} are not nested, as those of {', '.join(nested)} are: leave r out"
        )
    if largest is not None and rank > largest:
        raise InputError(f"the adapter has ranks up to {largest}, got {rank}")
    return cut


def _whole(
    graph: Graph, host: PlannedInsertion, target: Any, common: dict[str, Any], **options: Any
) -> PlannedInsertion:
    """Parameters trained whole beside a method: PEFT's `modules_to_save`, and the biases of `bias`."""
    cls = next(c for c in METHODS.values() if c.peft is not None and c.peft.joins == "modules_to_save")
    item = Insert(cls(**options), target=target, **common)
    return PlannedInsertion(host.entry, item, item.selection(graph), host.checkpoint)


def _biases(graph: Graph, host: PlannedInsertion, common: dict[str, Any]) -> list[PlannedInsertion]:
    """The biases that a low-rank method's option `bias` trains: of the layers it adapts, or all."""
    which = getattr(host.insert.method, "biases", "none")
    if which == "none":
        return []
    adapted = tuple(dict.fromkeys(site.module for site in host.selection.sites))
    found = _whole(graph, host, adapted if which == "lora_only" else "*", common, parameters=("bias",))
    return [found] if found.selection.sites else []


def match_checkpoints(spec: Spec, graph: Graph, entries: Sequence[PlannedInsertion]) -> None:
    """Hold the keys and shapes of every checkpoint against what will be inserted for it."""
    for path in dict.fromkeys(p.checkpoint.path for p in entries if p.checkpoint is not None):
        members = [p for p in entries if p.checkpoint is not None and p.checkpoint.path == path]
        checkpoint = members[0].checkpoint
        assert checkpoint is not None
        layout = PeftLayout([site for p in members for site in p.selection.sites], weight_order(graph))
        expected: dict[str, Param] = {}
        for planned in members:
            method, sites = planned.stored_as, planned.selection.sites
            for site in sites:
                for param in method.at(site).stored(site).values():
                    expected[
                        site.key(param.key) if checkpoint.in_adaptc_format else layout.key(site, param)
                    ] = param
            expected |= {f"{ROOT}{param.key}": param for param in method.shared(sites).values()}
        expected = {key: param for key, param in expected.items() if param.stored}
        try:
            match(checkpoint, expected)
        except WeightError as error:
            raise spec.weight_error(("adapt", members[0].entry, "adapter"), error) from None


def with_words(spec: Spec, graph: Graph, index: int, item: Insert[Any]) -> Insert[Any]:
    """What is inserted, with its words as numbers of tokens.

    Raises:
        SpecError: the base has no tokenizer.
    """
    method = item.method
    if not isinstance(method, InputMethod) or not method.texts:
        return item
    origin = graph.source.pretrained
    tokenize = _tokenizer(origin) if origin is not None else None
    if origin is None or tokenize is None:
        words = f"{method.name} starts from words, and {graph.source.describe} has no tokenizer"
        raise spec.error(
            ("adapt", index),
            words,
            "save one beside the model, or give the numbers: init_tokens: [[7], [12]]",
        )
    labels = [str(name) for _, name in sorted((getattr(origin.config, "id2label", None) or {}).items())]
    return replace(item, method=method.tokenized(tokenize, labels))


def _tokenizer(origin: Any) -> Callable[[str, bool], Sequence[int]] | None:
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(origin.name, trust_remote_code=origin.trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError):
        return None
    return lambda text, special: found(text, add_special_tokens=special)["input_ids"]
