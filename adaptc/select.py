"""Which sites an entry of a spec means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adaptc.graph import Graph
from adaptc.method import Method
from adaptc.names import layer_of, matches, matches_any, nearest, parse_layers
from adaptc.sites import Site

ALL_LINEAR = "all-linear"
Target = str | Sequence[str] | Mapping[str, Any]


@dataclass(frozen=True)
class Selection:
    """What a target matched.

    Attributes:
        sites: the matched sites, in the order of execution.
        excluded: modules that the target matched and `exclude` took out.
        unused: patterns that matched no site.
        near: modules whose names come close to an unused pattern, or that match but cannot be adapted so.
        heads: output heads that `all-linear` left out.
    """

    sites: tuple[Site, ...]
    excluded: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    near: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()


def select(graph: Graph, target: Target, exclude: Sequence[str], method: Method) -> Selection:
    """The sites of a kind the method can sit on whose module the target names.

    A method for whole modules (kind `parameter`) takes every parameter below the module named.
    """
    whole = "parameter" in method.kinds
    candidates = graph.parameter_sites if whole else [s for s in graph.sites if s.kind in method.kinds]
    patterns, wanted = _patterns(target)
    heads = (
        sorted({s.module for s in candidates if s.module in graph.heads}) if ALL_LINEAR in patterns else []
    )
    used: set[str] = set()
    chosen, excluded = [], []
    for site in candidates:
        names = _lineage(site.module) if whole else [site.module]
        hits = [p for p in patterns if _hits(p, names, site, graph)]
        if not hits or not wanted(site):
            continue
        used.update(hits)
        if any(matches_any(exclude, name) for name in names):
            excluded.append(site.module)
        else:
            chosen.append(site)
    unused = tuple(p for p in patterns if p not in used)
    return Selection(
        tuple(chosen), tuple(dict.fromkeys(excluded)), unused, _near(graph, unused, candidates), tuple(heads)
    )


def _lineage(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


def _hits(pattern: str, names: Sequence[str], site: Site, graph: Graph) -> bool:
    if pattern == ALL_LINEAR:
        return site.kind == "linear" and site.module not in graph.heads
    return any(matches(pattern, name) for name in names)


def _patterns(target: Target) -> tuple[list[str], Any]:
    if isinstance(target, str):
        return [target], lambda site: True
    if not isinstance(target, Mapping):
        return list(target), lambda site: True
    names = target.get("name") or "*"
    layers = parse_layers(target["layers"]) if target.get("layers") else None
    kind = target.get("type")

    def wanted(site: Site) -> bool:
        return (kind is None or matches(kind, site.type)) and (
            layers is None or layer_of(site.module) in layers
        )

    return [names] if isinstance(names, str) else list(names), wanted


def _near(graph: Graph, unused: Sequence[str], candidates: Sequence[Site]) -> tuple[str, ...]:
    modules = list(dict.fromkeys(site.module for site in candidates))
    lasts = {module.rpartition(".")[2]: module for module in modules}
    found: list[str] = []
    for pattern in unused:
        others = [
            f"{s.module} ({s.type}, not {'/'.join({c.kind for c in candidates}) or 'adaptable'})"
            for s in graph.parameter_sites
            if matches(pattern, s.module)
        ][:2]
        last = pattern.removeprefix("re:").rpartition(".")[2].strip("*$^\\")
        ending = [m for m in modules if matches("*." + pattern, m)]
        if ending:
            found.append(f"'*.{pattern}' matches {len(ending)} of them")
        found += others or nearest(pattern, modules, 2) or [lasts[n] for n in nearest(last, lasts, 2)]
        found += ending[:2]
    return tuple(dict.fromkeys(found))[:6]
