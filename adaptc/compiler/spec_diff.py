"""What changes from one spec to another: options, adapted sites, products and cost. No weight is read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adaptc.compiler.driver import plan
from adaptc.compiler.plan.report import PlanReport, pattern_of
from adaptc.methods.point_sites import Site
from adaptc.methods.site import WeightSite
from adaptc.spec.changes import Entries, ValueChange, entry_changes, value_changes
from adaptc.spec.spec import Spec, dump

LISTS = ("adapt", "quantize")
"""The keys of a spec that hold entries."""


@dataclass(frozen=True)
class SiteChange:
    """A site that is adapted or quantized otherwise.

    Attributes:
        site: its name.
        pattern: the same with `*` for the numbers in it.
        before: what is on it in the first, in order: `lora 'default'`.
        after: what is on it in the second.
    """

    site: str
    pattern: str
    before: tuple[str, ...]
    after: tuple[str, ...]


@dataclass(frozen=True)
class SpecDiff:
    """What changes from one spec to another.

    Attributes:
        options: what the specs state otherwise, but for products, and the pipeline.
        sites: the sites on which something else is.
        products: what is emitted otherwise.
        cost: the numbers of the plan that differ.
    """

    options: list[ValueChange]
    sites: list[SiteChange]
    products: list[ValueChange]
    cost: list[ValueChange]

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return not (self.options or self.sites or self.products or self.cost)

    def to_json(self) -> dict[str, Any]:
        """Plain data: `same`, and a list for each attribute."""
        return json.loads(json.dumps({"same": self.same, **asdict(self)}, default=str))

    def __str__(self) -> str:
        """The changes for a person, below a heading for each kind."""
        sites = Counter((change.pattern, change.before, change.after) for change in self.sites)
        sections = {
            "options": [str(change) for change in self.options],
            "sites": [_site_line(*key, count) for key, count in sites.items()],
            "products": [str(change) for change in self.products],
            "cost": [str(change) for change in self.cost],
        }
        lines = [
            line for name, rows in sections.items() if rows for line in (name, *(f"  {r}" for r in rows))
        ]
        return "\n".join(lines) or "no difference"


def _site_line(pattern: str, before: tuple[str, ...], after: tuple[str, ...], count: int) -> str:
    where = f"{pattern} ({count} sites)" if count > 1 else pattern
    if not before:
        return f"+ {where}: {', '.join(after)}"
    if not after:
        return f"- {where}: {', '.join(before)}"
    return f"{where}: {', '.join(before)} -> {', '.join(after)}"


def diff_specs(before: str | Path, after: str | Path) -> SpecDiff:
    """Compare two specs and their plans.

    Args:
        before: the first spec's file.
        after: the second's.

    Raises:
        SpecError: one is wrong.
        AdaptcError: one cannot be planned.
    """
    (first, first_plan), (second, second_plan) = plan(before), plan(after)
    return SpecDiff(
        _options(first, second, first_plan, second_plan),
        _sites(first_plan, second_plan),
        entry_changes(_entries(first, "emit"), _entries(second, "emit"), _product),
        value_changes(asdict(first_plan.budget), asdict(second_plan.budget)),
    )


def _options(first: Spec, second: Spec, first_plan: PlanReport, second_plan: PlanReport) -> list[ValueChange]:
    """What two specs state otherwise, but for what they emit; and their pipelines."""
    ours, theirs = dump(first), dump(second)
    plain = [{k: v for k, v in d.items() if k not in (*LISTS, "adapters", "emit")} for d in (ours, theirs)]
    changes = value_changes(plain[0], plain[1])
    for key in LISTS:
        changes += entry_changes(_entries(first, key), _entries(second, key), _entry, key)
    for name in {**first.adapters, **second.adapters}:
        before, after = (_entries(spec, "adapters", name) for spec in (first, second))
        changes += entry_changes(before, after, _entry, f"adapters.{name}")
    pipelines = [" > ".join(each.pipeline) for each in (first_plan, second_plan)]
    return changes + value_changes(pipelines[0], pipelines[1], "pipeline")


def _entries(spec: Spec, key: str, name: str | None = None) -> Entries:
    """The entries under a key of a spec; with a name, those of an alternative."""
    written: Any = spec.model_dump(mode="json", exclude_unset=True, exclude_none=True, fallback=repr)
    sides = [
        data.get(key, []) if name is None else data.get(key, {}).get(name, [])
        for data in (dump(spec), written)
    ]
    return Entries(*sides)


def _entry(entry: Mapping[str, Any]) -> str:
    """The name of an entry: its method or adapter, and the name it gives that."""
    if "combine" in entry:
        return "combine"
    what = entry.get("method") or entry.get("adapter")
    return f"{what} {entry['name']!r}" if entry.get("name") else str(what)


def _product(entry: Mapping[str, Any]) -> str:
    """The name of a product: its format and path."""
    return f"{entry['format']} {entry['path']}"


def _sites(before: PlanReport, after: PlanReport) -> list[SiteChange]:
    """The sites on which something else is, in the order of the first plan."""
    ours, theirs = _placed(before), _placed(after)
    nothing: tuple[str, tuple[str, ...]] = ("", ())
    changes: list[SiteChange] = []
    for name in {**ours, **theirs}:
        (pattern, old), (other, new) = ours.get(name, nothing), theirs.get(name, nothing)
        if old != new:
            changes.append(SiteChange(name, pattern or other, old, new))
    return changes


def _placed(report: PlanReport) -> dict[str, tuple[str, tuple[str, ...]]]:
    """The name of each site -> its pattern, and what is on it in order."""
    placed: dict[str, tuple[str, tuple[str, ...]]] = {}

    def place(site: Site, what: str) -> None:
        name = site.name + (f"[{site.piece}]" if isinstance(site, WeightSite) and site.piece else "")
        placed[name] = pattern_of(site), (*placed.get(name, ("", ()))[1], what)

    for planned in report.quantized:
        for site in planned.selection.sites:
            place(site, planned.item.scheme.text)
    alternatives = [planned for name in report.alternatives for _, planned in report.added(name)]
    for planned in (*report.entries, *alternatives):
        for site in planned.selection.sites:
            place(site, f"{planned.insert.method.name} {planned.insert.adapter!r}")
    return placed
