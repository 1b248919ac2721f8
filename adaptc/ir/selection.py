"""A target that matches nothing: what there is instead."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic

from adaptc.errors import nearest
from adaptc.ir.analysis.points import named_point
from adaptc.ir.analysis.roles import PIECES, SLICES
from adaptc.ir.graph import Graph
from adaptc.methods.method import Method, S
from adaptc.methods.point_sites import AnyPoint, AttentionSite, Point, Site, SubLayer
from adaptc.methods.site import KINDS, MATRIX_KINDS, POINTS, SUBLAYER, Layout, WeightSite
from adaptc.patterns import SLICE_NAMES, layer_of, matches, matches_any, parse_layers, sliced
from adaptc.quantization.scheme import Scheme

KNOWN_AS: Mapping[str, str] = {
    "sub-layer": "a sub-layer is what ends in a matrix product and is added to the stream that it was computed from: "
    "name another point, target: {node: ...} (`--print-after all` shows the nodes)",
    "attention": "an attention is scaled_dot_product_attention, or two products of activations around a softmax",
    "input": "an input is an integer input (batch, seq) that is looked up in an embedding",
}
"""How points are recognised."""


def no_match(
    graph: Graph, method: Method[Any] | Scheme, selection: Selection[Any], trained: bool
) -> tuple[str, ...]:
    """Words for an entry whose target matches no layer; `trained`: it comes from a checkpoint."""
    kinds = "/".join(kind for kind in KINDS if kind in method.kinds)
    what = kinds if method.kinds & POINTS else f"{kinds} layer"
    words = [f"{method.name}: the target matches no {what} of {graph.source.describe}"]
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
    if trained:
        words.append("the adapter was trained on another base, or on another task's model: see base.task")
    return tuple(words)


def _points_of(graph: Graph, kind: str) -> list[AnyPoint]:
    return [point for point in graph.points if point.kind == kind]


ALL_LINEAR = "all-linear"
Target = str | Sequence[str] | Mapping[str, Any]


@dataclass(frozen=True)
class Selection(Generic[S]):
    """What a target matched.

    Attributes:
        sites: the matched sites, in the order of execution.
        excluded: modules that the target matched and `exclude` took out.
        unused: patterns that matched no site.
        near: modules whose names come close to an unused pattern, or that match but cannot be adapted so.
        heads: output heads that `all-linear` left out.
        lacking: why a slice, a role or an operation that was asked for is not there.
    """

    sites: tuple[S, ...]
    excluded: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    near: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    lacking: tuple[str, ...] = ()


def select(
    graph: Graph, target: Target, exclude: Sequence[str], method: Method[Any] | Scheme
) -> Selection[Any]:
    """The sites of a kind the method can sit on whose module the target names.

    A method for whole modules (kind `parameter`) takes every parameter below the module named.
    """
    whole = "parameter" in method.kinds
    candidates: list[Any] = graph.parameter_sites if whole else _places(graph, method, target)
    candidates = [site for site in candidates if method.takes(site)]
    patterns, wanted = _patterns(target, graph)
    heads = (
        sorted({s.module for s in candidates if s.module in graph.heads}) if ALL_LINEAR in patterns else []
    )
    used: set[str] = set()
    sought: dict[str, list[Site]] = {}
    chosen, excluded = [], []
    for site in candidates:
        names = _lineage(site.module) if whole else [site.module, site.name]
        if not wanted(site) or not any(_hits(sliced(p)[0], names, site, graph) for p in patterns):
            continue
        found: list[Site] = []
        for pattern in patterns:
            name, slices = sliced(pattern)
            if _hits(name, names, site, graph):
                for piece in slices:
                    sought.setdefault(piece, []).append(site)
                parts = _parts(site, slices, graph) if slices and not whole else [] if slices else [site]
                parts = [part for whole_site in parts for part in _playing(whole_site, target, graph)]
                used.update([pattern] if parts else [])
                found += [part for part in parts if part not in found]
        if any(matches_any(exclude, name) for name in names):
            excluded.append(site.module)
        else:
            chosen += found
    unused = tuple(p for p in patterns if p not in used)
    lacking = (
        *_lacking_slices(sought, chosen, graph),
        *([] if chosen else _lacking(target, candidates, graph)),
    )
    return Selection(
        sites=tuple(chosen),
        excluded=tuple(dict.fromkeys(excluded)),
        unused=unused,
        near=_near(graph, unused, candidates),
        heads=tuple(heads),
        lacking=lacking,
    )


def _places(graph: Graph, method: Method[Any] | Scheme, target: Target) -> list[Site]:
    """The sites of a method's kinds; of activations the one that is named by its node, if one is."""
    if not method.kinds & POINTS:
        return [site for site in graph.sites if site.kind in method.kinds]
    node = target.get("node") if isinstance(target, Mapping) else None
    if node is not None and method.kinds == {SUBLAYER}:
        return named_point((graph.as_traced or graph).nodes, node, target.get("input") or "")  # type: ignore[union-attr]
    return [site for site in graph.points if site.kind in method.kinds]


def _roles(site: Site, graph: Graph) -> Collection[str]:
    """What a site does: its own role where it is a point, else that of its weight."""
    if isinstance(site, Point):
        role = (
            site.role if isinstance(site, SubLayer) else site.half if isinstance(site, AttentionSite) else ""
        )
        return [role] if role else []
    if site.kind == "parameter":
        return {role for s in _beside(site, graph) for role in graph.roles.of.get(s.uses[0], ())}
    return graph.roles.of.get(site.uses[0], ())


def _beside(site: Site, graph: Graph) -> list[Site]:
    """The layers of a parameter's own module."""
    return [s for s in graph.sites if s.module == site.module and s.kind in MATRIX_KINDS]


def _playing(site: Site, target: Target, graph: Graph) -> list[Site]:
    """Of a fused weight that a role was asked of, the rows that play it; else the site as it is."""
    role = target.get("role") if isinstance(target, Mapping) else None
    played = [r for r in _roles(site, graph) if role is not None and matches(role, r)]
    rows = {r: graph.roles.rows.get((site.uses[0], r)) for r in sorted(played)}
    if site.rows or not rows or not all(rows.values()):
        return [site]
    return [replace(site, rows=found, piece=PIECES[r]) for r, found in rows.items() if found]


def _lacking_slices(
    sought: Mapping[str, Sequence[Site]], chosen: Sequence[Site], graph: Graph
) -> Iterator[str]:
    """Words for slices that none of the layers named has."""
    for piece, sites in sought.items():
        if any(_parts(site, [piece], graph) for site in sites):
            continue
        first = sites[0]
        if not isinstance(first, WeightSite):
            yield f"{first.module}[{piece}] is no slice: a {first.kind} has none"
            continue
        known = [PIECES[role] for use, role in graph.roles.rows if use == first.uses[0] and role in PIECES]
        has = (
            f"its slices are {', '.join(sorted(known, key=SLICE_NAMES.index))}"
            if known
            else "it is not fused"
        )
        yield f"{first.module}[{piece}] is no slice: {has}, and it has rows 0:{first.out_features}"


def _lacking(target: Target, candidates: Sequence[Site], graph: Graph) -> Iterator[str]:
    """Words for a role or an operation that no layer has."""
    if not isinstance(target, Mapping):
        return
    if target.get("role"):
        known = sorted({role for site in candidates for role in _roles(site, graph)})
        yield f"role {target['role']!r}: the layers here are {', '.join(known) or 'of none'}"
    if target.get("node"):
        known = [node.name for node in graph.nodes if node.op == "call_function"]
        nearby = ", ".join(nearest(target["node"], known, 3)) or "none of that spelling"
        words = f"no operation gives such a value; near: {nearby} (`--print-after all` shows the nodes)"
        yield f"node {target['node']!r}: {words}"
    if target.get("op"):
        known = sorted({site.op for site in candidates})
        yield f"op {target['op']!r}: the operations here are {', '.join(known) or 'none'}"


def _parts(site: Site, slices: Sequence[str], graph: Graph) -> list[Site]:
    """The slices of a fused weight that a pattern names: `q`, `gate`, or rows `0:512`; a point has none."""
    found: list[Site] = []
    if not isinstance(site, WeightSite):
        return found
    for name in slices:
        first, colon, last = name.partition(":")
        if colon:
            rows = ((int(first or 0), int(last or site.out_features)),)
            name = f"{rows[0][0]}:{rows[0][1]}"
            rows = rows if rows[0][1] <= site.out_features else ()
        else:
            rows = graph.roles.rows.get((site.uses[0], SLICES[name]), ())
        if rows and all(start < stop for start, stop in rows):
            found.append(replace(site, rows=rows, piece=name))
    return found


def _lineage(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


def _hits(pattern: str, names: Sequence[str], site: Site, graph: Graph) -> bool:
    if pattern == ALL_LINEAR:
        linear = site.kind == "linear" or any(s.kind == "linear" for s in _beside(site, graph))
        return linear and site.module not in graph.heads
    return any(matches(pattern, name) for name in names)


def _patterns(target: Target, graph: Graph) -> tuple[list[str], Callable[[Site], bool]]:
    if isinstance(target, str):
        return [target], lambda site: True
    if not isinstance(target, Mapping):
        return list(target), lambda site: True
    names = target.get("name") or "*"
    layers = parse_layers(target["layers"]) if target.get("layers") else None
    kind, op, role, node = (target.get(key) for key in ("type", "op", "role", "node"))

    def wanted(site: Site) -> bool:
        return (
            (kind is None or matches(kind, site.type))
            and (layers is None or layer_of(site.module) in layers)
            and (op is None or matches(op, site.op))
            and (node is None or site.kind == SUBLAYER or node in {use.node for use in site.uses})
            and (role is None or any(matches(role, r) for r in _roles(site, graph)))
        )

    return [names] if isinstance(names, str) else list(names), wanted


def _near(graph: Graph, unused: Sequence[str], candidates: Sequence[Site]) -> tuple[str, ...]:
    modules = list(dict.fromkeys(site.module for site in candidates))
    lasts = {module.rpartition(".")[2]: module for module in modules}
    found: list[str] = []
    kinds = "/".join(kind for kind in KINDS if kind in {c.kind for c in candidates}) or "adaptable"
    for pattern in unused:
        others = [
            f"{s.module} ({s.type}, not {kinds})" for s in graph.parameter_sites if matches(pattern, s.module)
        ][:2]
        last = pattern.removeprefix("re:").rpartition(".")[2].strip("*$^\\")
        ending = [m for m in modules if matches("*." + pattern, m)]
        if ending:
            found.append(f"'*.{pattern}' matches {len(ending)} of them")
        found += others or nearest(pattern, modules, 2) or [lasts[n] for n in nearest(last, lasts, 2)]
        found += ending[:2]
    return tuple(dict.fromkeys(found))[:6]


def as_stored(site: WeightSite, graph: Graph) -> WeightSite:
    """The site as PEFT's `target_parameters` reads it: (out, in) or (experts, out, in), however the model multiplies.

    Three axes of a module that says `is_transposed` are (experts, in, out).
    """
    if not site.by_parameter or len(site.shape) not in (2, 3):
        return site
    owner = graph.source.model.get_submodule(site.module) if graph.source.model is not None else None
    turned = len(site.shape) == 3 and getattr(owner, "is_transposed", False)
    last, before = len(site.shape) - 1, len(site.shape) - 2
    out, inner = (last, before) if turned else (before, last)
    return replace(site, layout=Layout((out,), (inner,), tuple(range(before))))
