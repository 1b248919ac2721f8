"""The report of a plan: its cost, notes for the user, and all of it as plain data."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from adaptc.checkpoints.adapter import Checkpoint
from adaptc.compiler.plan.adapters import PlannedInsertion
from adaptc.compiler.plan.plan import Plan
from adaptc.compiler.plan.quantization import PlannedQuantization, expected_error, quantize_notes
from adaptc.compiler.rewrite import Rewritten
from adaptc.html_table import html_table
from adaptc.ir.aliases import module_names, used_elsewhere
from adaptc.ir.cost import Cost, cost_of
from adaptc.ir.graph import Graph
from adaptc.ir.state import state_notes
from adaptc.methods.method import WeightMethod
from adaptc.methods.point_sites import Site
from adaptc.methods.site import WeightSite
from adaptc.methods.virtual_tokens import PromptMethod
from adaptc.quantization.quantized_weight import matrix_size
from adaptc.rewriter.quantize import Quantize
from adaptc.spec.spec import Spec
from adaptc.spec.yaml_text import flow


@dataclass
class PlanReport(Plan):
    """A plan with its cost and notes for the user.

    Attributes:
        budget: the cost: parameters, memory and operations.
        notes: patterns without a match, excluded heads, what cannot be folded, and the like; a line each.
        growth: for each of `quantized`, by how much a layer's error grows in the model's outputs at most.
        inputs: name -> dtype and dimensions, of every input of the model.
        constants: what the model takes beside them, the same in every call -> its value.
        left_out: what the model could take beside them -> what stands for it.
        places: for each of `entries`, its place in the spec: `adapt.0`.
        alternatives: the plans of `adapters` by name, each with the entries that are always on in front.
    """

    budget: Cost = field(kw_only=True)
    notes: list[str] = field(kw_only=True)
    growth: list[float] = field(kw_only=True)
    inputs: dict[str, str] = field(kw_only=True)
    constants: dict[str, Any] = field(kw_only=True)
    left_out: dict[str, str] = field(kw_only=True)
    places: list[str] = field(kw_only=True)
    alternatives: dict[str, PlanReport] = field(kw_only=True, default_factory=dict[str, "PlanReport"])

    def _repr_html_(self) -> str:
        return self.to_html()

    def to_html(self) -> str:
        """The plan as a notebook shows it: its cost and its sites."""
        rows = [
            (site.module, planned.insert.method.name, site.kind, " x ".join(map(str, site.shape)))
            for planned in self.entries
            for site in planned.selection.sites
        ]
        return html_table(str(self.budget), ("module", "method", "kind", "shape"), rows)

    @property
    def summary(self) -> str:
        """The cost, the pipeline, the inputs, the alternatives and the notes, a line each."""
        pipeline = " > ".join(self.pipeline) or "none"
        inputs = "; ".join(f"{name}: {shape}" for name, shape in self.inputs.items())
        alternatives = {
            name: plan.budget.trainable - self.budget.trainable for name, plan in self.alternatives.items()
        }
        others = [note for plan in self.alternatives.values() for note in plan.notes]
        lines = [
            str(self.budget),
            f"pipeline    {pipeline}, then factor (trainable, live) or fold (folded)",
            f"passes:     {flow(self.stated)}",
            f"inputs      {inputs}",
            *(f"adapter     {name}: {count:,} parameters of its own" for name, count in alternatives.items()),
            *(f"note        {note}" for note in dict.fromkeys([*self.notes, *others])),
        ]
        return "\n".join(lines)

    def __str__(self) -> str:
        """The plan for a person: the sites of each entry, then `summary`."""
        inserted = [
            f"{place:<11} {planned.insert.method.name} {planned.insert.adapter!r}: "
            f"{_patterns(planned.selection.sites)}"
            for place, planned in [
                *zip(self.places, self.entries, strict=True),
                *(entry for name in self.alternatives for entry in self.added(name)),
            ]
        ]
        quantized = [
            f"{'base' if planned.entry is None else f'quantize.{planned.entry}':<11} {planned.item.scheme.text}: "
            f"{_patterns(planned.selection.sites)}"
            for planned in self.quantized
        ]
        return "\n".join([*inserted, *quantized, self.summary])

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data.

        Returns:
            `inputs`, `constants` and `left_out`, `entries`, `adapters` by name, `quantize`, `passes` as a spec states
            them, `pipeline` by name, `budget` and `notes`.
        """
        quantized = zip(self.quantized, self.growth, strict=True)
        return {
            "inputs": self.inputs,
            "constants": self.constants,
            "left_out": self.left_out,
            "entries": [_entry_json(planned) for planned in self.entries],
            "adapters": {name: self._alternative_json(name) for name in self.alternatives},
            "quantize": [_quantized_json(planned, growth) for planned, growth in quantized],
            "passes": self.stated,
            "pipeline": self.pipeline,
            "budget": dataclasses.asdict(self.budget) | {"trainable_share": self.budget.share},
            "notes": self.notes,
        }

    def added(self, name: str) -> list[tuple[str, PlannedInsertion]]:
        """What an alternative adds to what is always on: the place of each entry in the spec, and the entry."""
        plan = self.alternatives[name]
        return list(zip(plan.places, plan.entries, strict=True))[len(self.entries) :]

    def _alternative_json(self, name: str) -> dict[str, Any]:
        """An alternative as plain data: what it adds to what is always on."""
        plan = self.alternatives[name]
        return {
            "entries": [_entry_json(planned) | {"place": place} for place, planned in self.added(name)],
            "trainable": plan.budget.trainable - self.budget.trainable,
            "notes": [note for note in plan.notes if note not in self.notes],
        }


def pattern_of(site: Site) -> str:
    """The name of a site with `*` for the numbers in it."""
    plain = isinstance(site, WeightSite) and site.kind == "linear" and site.module and not site.shared
    name = (site.module if plain else site.name) + (f"[{site.piece}]" if site.piece else "")
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _patterns(sites: Sequence[Site]) -> str:
    """How many sites, and the patterns of their names."""
    patterns = dict.fromkeys(pattern_of(site) for site in sites)
    return f"{len(sites)} {'site' if len(sites) == 1 else 'sites'}, {', '.join(patterns)}"


def plan_report(
    spec: Spec, graph: Graph, plan: Plan, rewritten: Rewritten, bound: Sequence[str] = ()
) -> PlanReport:
    """A plan with its cost and notes.

    Args:
        spec: the spec.
        graph: the traced graph.
        plan: the plan.
        rewritten: the graph after its passes.
        bound: notes on the weights of the base, where they were bound.
    """
    notes = [
        *left_out_notes(graph),
        *graph.source.notes,
        *state_notes(graph.nodes),
        *_entry_notes(spec, plan.entries),
        *_alias_notes(spec, graph, plan.entries),
    ]
    notes += [plan.choice] if plan.choice else []
    notes += quantize_notes(graph, plan.quantized)
    notes += [
        f"{record.name} changes results: {record.change}" for record in rewritten.records if record.change
    ]
    notes += [*_fold_notes(spec, plan, rewritten), *_alternative_notes(spec), *bound]
    return PlanReport(
        **vars(plan),
        budget=cost_of(graph, rewritten.adapted, rewritten.factored, rewritten.folded),
        notes=notes,
        growth=[planned.growth(rewritten.adapted) for planned in plan.quantized],
        inputs={spec.name: str(spec) for spec in graph.inputs},
        constants={spec.name: spec.stated for spec in graph.source.constants},
        left_out=dict(graph.source.left_out),
        places=[spec.shown_place(planned.entry) for planned in plan.entries],
    )


def _alternative_notes(spec: Spec) -> list[str]:
    """The alternatives that no artifact holds, where the spec emits any."""
    if not spec.emit or any(entry.format == "peft" for entry in spec.emit):
        return []
    held = {entry.name for entry in spec.emit if entry.format == "onnx-adapter"}
    return [
        f"adapters.{name}: no artifact holds it: emit {{format: onnx-adapter, path: ..., name: {name}}}"
        for name in spec.adapters
        if name not in held
    ]


def left_out_notes(graph: Graph) -> list[str]:
    """The note on the tensors that the model could take and that are no input, with what stands for each."""
    others = "; ".join(f"{name}: {stand_in}" for name, stand_in in graph.source.left_out.items())
    return [f"no input, and what stands for it: {others} (to take one in, write `inputs`)"] if others else []


def _fold_notes(spec: Spec, plan: Plan, rewritten: Rewritten) -> list[str]:
    """What cannot be folded, which adapters stay in a folded graph, and what is quantized only after `fold`."""
    notes = [f"cannot be folded: {refusal}" for refusal in rewritten.refusals]
    if any(isinstance(item, Quantize) for item in plan.closing):
        notes += [
            f"emit.{index}: the trainable module keeps its weights in floats: `quantize` comes after `fold`"
            for index, entry in enumerate(spec.emit)
            if entry.format == "torch"
        ]
    stays = rewritten.adapted.staying
    return notes + (
        [f"{stays} cannot be folded: it stays in every artifact and adds operations there"] if stays else []
    )


def _entry_notes(spec: Spec, entries: Sequence[PlannedInsertion]) -> list[str]:
    """Patterns without a match, layers left out, and methods that change the model before any training."""
    notes: list[str] = []
    for planned in entries:
        where, selection = spec.shown_place(planned.entry), planned.selection
        if planned.checkpoint is None:
            notes += [f"{where}: pattern {pattern!r} matches nothing" for pattern in selection.unused]
        method = planned.insert.method
        if isinstance(method, PromptMethod):
            count = method.num_virtual_tokens
            notes.append(
                f"{where}: positions start after {count} virtual tokens, so the longest sequence is {count} shorter"
            )
        if planned.checkpoint is None and not planned.insert.method.identity_at_init:
            notes.append(
                f"{where}: {planned.insert.method.name} changes the base's outputs before any training"
            )
        if planned.checkpoint is not None:
            notes += [f"{where}: {note}" for note in _checkpoint_notes(planned.checkpoint)]
        if selection.heads:
            notes.append(
                f"{where}: all-linear leaves out the output head {', '.join(selection.heads)}; name it to adapt it too"
            )
        notes += [f"{where}: left out: {message}" for message in selection.computed]
    return list(dict.fromkeys(notes))


def _checkpoint_notes(checkpoint: Checkpoint) -> list[str]:
    """What was read otherwise than it stands in the files of a checkpoint, and what is left out."""
    notes = [f"read without the option {key} of its configuration" for key in checkpoint.ignored]
    notes += checkpoint.notes
    layers = ", ".join(dict.fromkeys(checkpoint.without_effect.values()))
    if layers:
        notes.append(f"no output depends on {layers}, so its adapter has no effect and is left out")
    return notes


def _alias_notes(spec: Spec, graph: Graph, entries: Sequence[PlannedInsertion]) -> list[str]:
    """What becomes of adapted tensors that are used elsewhere too; `refuse` is an error when they are folded."""
    notes: list[str] = []
    outcomes = {
        "untie": "untied: both are written, each with its own values",
        "share": "shared: the others change with it",
        "live": "kept live: its adapter stays in the folded artifact, computed when the program is loaded",
    }
    for planned in entries:
        for site in planned.selection.sites:
            method = planned.insert.method
            if planned.insert.on_alias not in outcomes or not isinstance(method, WeightMethod):
                continue
            beside = method.adapts_bias() and site.bias
            for name, bias in ((site.name, False), *([(str(site.bias), True)] if beside else [])):
                others = used_elsewhere(graph, site, bias)
                if others:
                    use = f"{spec.shown_place(planned.entry)}: {name} is also used by {module_names(others)}"
                    notes.append(f"{use}; it is {outcomes[planned.insert.on_alias]}")
    return notes


def _entry_json(planned: PlannedInsertion) -> dict[str, Any]:
    """An entry of `adapt` as plain data."""
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


def _quantized_json(planned: PlannedQuantization, growth: float) -> dict[str, Any]:
    """An entry of `quantize` as plain data, with the errors to expect of weights and of the model's outputs."""
    expected = planned.expected()
    scheme = planned.item.scheme
    return {
        "entry": planned.entry,
        "method": scheme.name,
        "scheme": scheme.text,
        "sites": [
            site_json(site) | {"expected_error": expected_error(scheme, matrix_size(site)[1])}
            for site in planned.selection.sites
        ],
        "bytes": planned.stored,
        "bits": planned.bits,
        "expected_errors": expected,
        "expected_output_errors": {order: growth * error for order, error in expected.items()},
        "excluded": list(planned.selection.excluded),
    }


def site_json(site: Site) -> dict[str, Any]:
    """A site as plain data: its module, type, kind, parameter, shape, dtype, source line, operation and slice."""
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
