"""The plan: which site gets what, at which cost, by which passes. No weight is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import fx

from adaptc.aliases import elsewhere, places
from adaptc.budget import Budget, budget
from adaptc.errors import Problem, RefusedError, SpecError
from adaptc.graph import Graph
from adaptc.insert import Insert
from adaptc.kinds import TOKENS, PromptMethod
from adaptc.method import WeightMethod
from adaptc.names import nearest, shared_name
from adaptc.pipeline import Pass, check_order, run
from adaptc.planned import Planned, entries_of, match_checkpoints
from adaptc.points import POINTS
from adaptc.registry import load_passes
from adaptc.sites import KINDS, Site
from adaptc.spec import Spec

KNOWN_AS: Mapping[str, str] = {
    "sub-layer": "a sub-layer is what ends in a matrix product and is added to the stream that it was computed from: "
    "name another point, target: {node: ...} (`--print-after all` shows the nodes)",
    "attention": "an attention is scaled_dot_product_attention, or two products of activations around a softmax",
    "input": "an input is an integer input (batch, seq) that is looked up in an embedding",
}
"""How points are recognised."""


@dataclass
class Plan:
    """What compiling will do.

    Attributes:
        entries: what is inserted, in order.
        passes: the pipeline that every product starts with.
        budget: parameters, memory and operations.
        notes: what the person should know: patterns without a match, excluded heads, what cannot fold.
        adapted: the graph after the pipeline; its weights are not loaded.
        factored: the same, factored, where the pipeline has not done so itself.
        records: what each pass did.
    """

    entries: list[Planned]
    passes: list[Pass]
    budget: Budget
    notes: list[str]
    adapted: Graph
    factored: Graph
    records: list[Any] = field(default_factory=list)

    @property
    def sites(self) -> list[Site]:
        """Every matched site, entry by entry."""
        return [site for planned in self.entries for site in planned.selection.sites]

    @property
    def pipeline(self) -> list[str]:
        """The passes by name; `factor` follows for the trainable module, `fold` for the folded one."""
        return [item.name for item in self.passes]

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data."""
        return {
            "entries": [_entry_json(planned) for planned in self.entries],
            "passes": self.pipeline,
            "budget": dataclasses.asdict(self.budget) | {"trainable_share": self.budget.share},
            "notes": self.notes,
        }


def make_plan(spec: Spec, graph: Graph, after: Any = None) -> Plan:
    """Match every entry with the graph, check that each can be inserted, and count.

    Raises:
        SpecError: a target matches nothing, a method cannot sit on a layer, a name is taken, a layer has no
            path to the output, or the passes stand in an impossible order. All problems at once.
        WeightError: an adapter's checkpoint cannot be read.
    """
    entries = [found for index in range(len(spec.adapt)) for found in entries_of(spec, graph, index)]
    problems = [problem for found in entries for problem in _problems(spec, graph, found)]
    problems += _name_clashes(spec, entries)
    if problems:
        raise SpecError(problems)
    match_checkpoints(spec, graph, entries)
    passes = _pipeline(spec, entries)
    wrong = check_order(passes)
    if wrong:
        raise spec.error(("passes",), wrong, "see `adaptc passes` for the stages each pass takes and leaves")
    records: list[Any] = []
    try:
        adapted = run(graph, passes, records, after)
    except RefusedError as error:
        if not isinstance(error.source, Insert):
            raise
        raise spec.error(("adapt", error.source.entry), *str(error).splitlines()) from error
    _check_products(spec, adapted)
    factor, fold = load_passes()["factor"](), load_passes()["fold"]()
    factored = run(adapted, [factor], records, after) if adapted.stage in factor.takes else adapted
    notes = [*graph.base.notes, *_notes(entries), *_alias_notes(graph, entries)]
    refusals = fold.requires(adapted) if adapted.stage in fold.takes else []
    notes += [f"cannot be folded: {refusal}" for refusal in refusals]
    stays = adapted.staying
    if stays:
        notes.append(f"{stays} stays when the rest is folded, and is paid for in every product")
    left = run(adapted, [fold]) if stays and adapted.stage in fold.takes and not refusals else None
    counted = budget(graph, adapted, factored, left)
    return Plan(entries, passes, counted, notes, adapted, factored, records)


def _problems(spec: Spec, graph: Graph, planned: Planned) -> list[Problem]:
    method, selection = planned.insert.method, planned.selection
    key = "adapter" if planned.checkpoint is not None else "target"
    if not selection.sites:
        return [spec.source.problem(("adapt", planned.entry, key), *_no_match(graph, planned))]
    if selection.lacking:
        words = (f"{method.name}: {selection.lacking[0]}", *selection.lacking[1:])
        return [spec.source.problem(("adapt", planned.entry, key), *words)]
    found: dict[Any, Problem] = {}
    for site in selection.sites:
        refused = planned.insert.refused(site)
        if refused:
            option, reason = refused
            found.setdefault(
                option,
                spec.source.problem(
                    ("adapt", planned.entry, *option), f"{method.name}: {reason}", f"site {site}"
                ),
            )
        elif not reaches_output(graph, site):
            found.setdefault(
                site.module,
                spec.source.problem(
                    ("adapt", planned.entry, key),
                    f"{site.module} is on no path to the output that carries a gradient, so it cannot be trained",
                    f"site {site}",
                    "leave it out with `exclude`",
                ),
            )
    return list(found.values())


def _no_match(graph: Graph, planned: Planned) -> tuple[str, ...]:
    method, selection = planned.insert.method, planned.selection
    kinds = "/".join(kind for kind in KINDS if kind in method.kinds)
    what = kinds if method.kinds & POINTS else f"{kinds} layer"
    words = [f"{method.name}: the target matches no {what} of {graph.base.describe}"]
    words += selection.lacking
    words += [KNOWN_AS[kind] for kind in sorted(method.kinds & POINTS) if not _points_of(graph, kind)]
    if selection.excluded:
        words.append(f"`exclude` took out all that matched: {', '.join(selection.excluded[:4])}")
    if selection.near:
        words.append(f"near: {', '.join(selection.near)}")
    unread = sorted({n.rpartition(".")[0] for n in graph.weights} - {s.module for s in graph.sites})
    hidden = [
        m
        for m in unread
        if any(p.removeprefix("re:").strip("*.") in m for p in selection.unused if p.strip("*."))
    ]
    if hidden:
        words.append(f"on no path to the output: {', '.join(hidden[:4])}")
    places = graph.points if method.kinds & POINTS else graph.sites
    modules = list(dict.fromkeys(s.module or "the model itself" for s in places if s.kind in method.kinds))
    words.append(f"such layers are: {', '.join(modules[:4]) or 'none'}{', ...' if len(modules) > 4 else ''}")
    if planned.checkpoint is not None:
        words.append("the adapter was trained on another base, or on another task's model: see base.task")
    return tuple(words)


def _points_of(graph: Graph, kind: str) -> list[Site]:
    return [point for point in graph.points if point.kind == kind]


def reaches_output(graph: Graph, site: Site) -> bool:
    """Whether a change of this site's weight can reach the output, and a gradient come back."""
    detach = torch.ops.aten.detach.default
    nodes = graph.by_name()
    queue = [nodes[use.node] for use in site.uses]
    seen: set[fx.Node] = set(queue)
    while queue:
        node = queue.pop()
        if node.op == "output":
            return True
        value = node.meta.get("val")
        if node.target is detach or (
            isinstance(value, torch.Tensor) and not (value.dtype.is_floating_point or value.is_complex())
        ):
            continue
        new = [user for user in node.users if user not in seen]
        seen.update(new)
        queue += new
    return False


def _name_clashes(spec: Spec, entries: Sequence[Planned]) -> list[Problem]:
    taken: dict[str, Planned] = {}
    problems = []
    for planned in entries:
        for site in planned.selection.sites:
            method = planned.insert.method
            names = [name for name, _ in planned.insert.tensors(site, planned.selection.sites).values()]
            if isinstance(method, PromptMethod):  # what makes them is dropped when they are saved
                names.append(shared_name(planned.insert.adapter, TOKENS))
            clash = next((n for n in names if taken.get(n, planned) is not planned), None)
            if clash:
                problems.append(
                    spec.source.problem(
                        ("adapt", planned.entry),
                        f"{method.name}: entry {taken[clash].entry} puts an adapter named "
                        f"{planned.insert.adapter!r} on {site.module} already",
                        "give one of them another `name`",
                    )
                )
                break
            taken |= dict.fromkeys(names, planned)
    return problems


def _pipeline(spec: Spec, entries: Sequence[Planned]) -> list[Pass]:
    inserts: list[Pass] = [planned.insert for planned in entries]
    if spec.passes is None:
        return inserts
    known = load_passes()
    passes: list[Pass] = []
    for index, item in enumerate(spec.passes):
        name, options = (item, {}) if isinstance(item, str) else next(iter(item.items()))
        if name == "insert":
            passes += inserts
            continue
        if name not in known:
            near = nearest(name, [*known, "insert"])
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise spec.error(
                ("passes", index), f"unknown pass {name!r}{hint}", f"known: insert, {', '.join(known)}"
            )
        fields = [f.name for f in dataclasses.fields(known[name])]  # type: ignore[arg-type]
        unknown = next((option for option in options if option not in fields), None)
        if unknown is not None:
            near = nearest(str(unknown), fields)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            shown = ", ".join(fields) or "none"
            raise spec.error(
                ("passes", index), f"{name}: unknown option {unknown!r}{hint}", f"its options: {shown}"
            )
        try:
            passes.append(TypeAdapter(known[name]).validate_python(options))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            option = ".".join(map(str, first["loc"]))
            words = f"{name}: {option}: {first['msg'].lower()}, got {first['input']!r}"
            raise spec.error(("passes", index), words, f"its options: {', '.join(fields)}") from None
    if inserts and not set(map(id, inserts)) <= set(map(id, passes)):
        raise spec.error(
            ("passes",),
            "the pipeline leaves out `insert`, which puts in what `adapt` asks for",
            "such as passes: [insert, ...]",
        )
    return passes


def _check_products(spec: Spec, adapted: Graph) -> None:
    """What is inserted has a place in every product, and the spec's own pipeline leaves what they need."""
    stays = adapted.staying
    for index, entry in enumerate(spec.emit):
        if entry.format == "hf" and stays:
            words = f"{stays} cannot be folded into weights, and a Hugging Face checkpoint holds nothing else"
            raise spec.error(
                ("emit", index, "format"), words, "emit onnx or torch; the adapter by itself as peft"
            )
    if spec.passes is None:
        return
    for index, entry in enumerate(spec.emit):
        folded = entry.format == "hf" or (entry.format == "onnx" and entry.adapters == "folded")
        if folded and adapted.adaptations and adapted.stage not in load_passes()["fold"].takes:
            raise spec.error(
                ("passes",),
                f"the pipeline leaves a graph that is {adapted.stage}, which emit.{index} cannot fold",
                "leave `factor` out: live and trainable products get it anyway",
            )
        if entry.format in ("torch", "peft") and spec.adapt and not adapted.adaptations:
            raise spec.error(
                ("passes",),
                f"the pipeline folds the adapters away, so emit.{index} has nothing left to train or save",
                "leave `fold` out: folded products get it anyway",
            )


def _notes(entries: Sequence[Planned]) -> list[str]:
    notes = []
    for planned in entries:
        where, selection = f"adapt.{planned.entry}", planned.selection
        if planned.checkpoint is None:
            notes += [f"{where}: pattern {pattern!r} matches nothing" for pattern in selection.unused]
        method = planned.insert.method
        if isinstance(method, PromptMethod):
            count = method.num_virtual_tokens
            notes.append(
                f"{where}: tokens count on behind {count} virtual ones: the longest sequence is shorter by these"
            )
        if planned.checkpoint is None and not planned.insert.method.identity_at_init:
            notes.append(
                f"{where}: {planned.insert.method.name} starts elsewhere than the base, before any training"
            )
        if selection.heads:
            notes.append(f"{where}: all-linear leaves out the output head {', '.join(selection.heads)}")
    return notes


def _alias_notes(graph: Graph, entries: Sequence[Planned]) -> list[str]:
    """What becomes of adapted tensors that are used elsewhere too; those that refuse say so when folded."""
    notes = []
    words = {
        "untie": "untied: both are written, each with its own values",
        "share": "shared: the others change with it",
        "live": "kept live: its adapter stays in what is folded, computed when the program is loaded",
    }
    for found in entries:
        for site in found.selection.sites:
            method = found.insert.method
            if found.insert.on_alias not in words or not isinstance(method, WeightMethod):
                continue
            beside = method.adapts_bias() and site.bias
            for name, bias in ((site.name, False), *([(str(site.bias), True)] if beside else [])):
                others = elsewhere(graph, site, bias)
                if others:
                    what = f"adapt.{found.entry}: {name} is also used by {places(others)}"
                    notes.append(f"{what}; it is {words[found.insert.on_alias]}")
    return notes


def _entry_json(planned: Planned) -> dict[str, Any]:
    selection = planned.selection
    return {
        "entry": planned.entry,
        "method": planned.insert.method.name,
        "adapter": planned.insert.adapter,
        "checkpoint": str(planned.checkpoint.path) if planned.checkpoint else None,
        "sites": [site_json(site) for site in selection.sites],
        "excluded": list(selection.excluded),
        "unused_patterns": list(selection.unused) if planned.checkpoint is None else [],
        "near_misses": list(selection.near),
    }


def site_json(site: Site) -> dict[str, Any]:
    """A site as plain data."""
    return {
        "module": site.module,
        "type": site.type,
        "kind": site.kind,
        "parameter": site.parameter,
        "shape": list(site.shape),
        "dtype": str(site.dtype).removeprefix("torch."),
        "source": site.source,
        "op": site.op,
        "slice": site.piece,
        "rows": [list(rows) for rows in site.rows],
    }
