"""Selection: which sites of a graph the target of a spec's entry matches."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic

from adaptc.ir.analysis.points import named_point
from adaptc.ir.computed_weights import computed_weights
from adaptc.ir.graph import Graph
from adaptc.ir.near_misses import lacking_criteria, lacking_slices, similar_modules
from adaptc.ir.slices import layers_beside, roles_in, roles_of, site_slices, slices_with_role
from adaptc.methods.method import Method, S
from adaptc.methods.point_sites import Site
from adaptc.methods.site import KINDS, POINTS, SUBLAYER, Layout, WeightSite
from adaptc.patterns import layer_of, matches, matches_any, parse_layers, sliced
from adaptc.quantization.scheme import Scheme

ALL_LINEAR = "all-linear"
"""The target that means every linear layer but the output heads: the library's own, or else the last layers."""
Target = str | Sequence[str] | Mapping[str, Any]
"""A pattern, several, or a mapping: `name`, `type`, `layers`, `op`, `role` (one or several), `node`, `input`."""


@dataclass(frozen=True)
class Selection(Generic[S]):
    """What a target matched.

    Attributes:
        sites: the matched sites, in the order of execution.
        excluded: modules that the target matched and `exclude` removed.
        unused: patterns that matched no site.
        near: modules whose names are similar to an unused pattern, or that match but are of another kind.
        heads: output heads that `all-linear` left out.
        lacking: messages on slices, roles, nodes and operations that the target names and the model lacks.
        computed: messages on layers that it names, whose weight is not stored.
    """

    sites: tuple[S, ...]
    excluded: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    near: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    lacking: tuple[str, ...] = ()
    computed: tuple[str, ...] = ()


def select(
    graph: Graph,
    target: Target,
    exclude: Sequence[str],
    method: Method[Any] | Scheme,
    every: bool = False,
) -> Selection[Any]:
    """The sites that a target matches, of the kinds that a method or scheme can be applied to.

    A method for whole modules (kind `parameter`) takes every parameter that the target names, and every one below a
    module that it names.

    Args:
        graph: the graph.
        target: what the spec's entry names.
        exclude: patterns on module names to leave out.
        method: the method or scheme.
        every: take every site of its kinds, whatever the method's `takes` says.
    """
    whole = "parameter" in method.kinds
    sites: Sequence[Any] = graph.parameter_sites if whole else _candidates(graph, method, target)
    candidates = [site for site in sites if every or method.takes(site)]
    patterns, wanted = _patterns(target, graph)
    criteria = _criteria(target)
    roles = roles_in(criteria)
    heads = (
        sorted({s.module for s in candidates if s.module in graph.output_heads})
        if ALL_LINEAR in patterns
        else []
    )
    used: set[str] = set()
    sought: dict[str, list[Site]] = {}
    chosen: list[Site] = []
    excluded: list[str] = []
    for site in candidates:
        names = [*(_ancestry(site.module) if whole else [site.module]), site.name]
        if not wanted(site) or not any(_named_by(sliced(p)[0], names, site, graph) for p in patterns):
            continue
        matched: list[Site] = []
        for pattern in patterns:
            name, slices = sliced(pattern)
            if _named_by(name, names, site, graph):
                for piece in slices:
                    sought.setdefault(piece, []).append(site)
                parts = [site] if not slices else [] if whole else site_slices(site, slices, graph)
                parts = [rows for part in parts for rows in slices_with_role(part, roles, graph)]
                used.update([pattern] if parts else [])
                matched += [part for part in parts if part not in matched]
        if any(matches_any(exclude, name) for name in names):
            excluded.append(site.module)
        else:
            chosen += matched
    unused = tuple(p for p in patterns if p not in used)
    lacking = list(lacking_slices(sought, graph))
    if not chosen:
        lacking += lacking_criteria(criteria, candidates, graph)
    return Selection(
        sites=tuple(chosen),
        excluded=tuple(dict.fromkeys(excluded)),
        unused=unused,
        near=similar_modules(graph, unused, candidates, method.kinds),
        heads=tuple(heads),
        lacking=tuple(lacking),
        computed=tuple(_computed(graph, patterns, exclude, method.kinds))
        if set(criteria) <= {"name"}
        else (),
    )


def _computed(
    graph: Graph, patterns: Sequence[str], exclude: Sequence[str], kinds: Collection[str]
) -> list[str]:
    """Messages on layers of these kinds that a pattern names, whose weight is not stored."""

    def wanted(name: str) -> bool:
        linear = ALL_LINEAR in patterns and name not in graph.output_heads
        return (linear or matches_any(patterns, name)) and not matches_any(exclude, name)

    layers = {"linear"} & set(kinds) if ALL_LINEAR in patterns else kinds
    return computed_weights(graph, layers, wanted)


def _candidates(graph: Graph, method: Method[Any] | Scheme, target: Target) -> Sequence[Site]:
    """The sites of a method's kinds; for sub-layers, if the target names a node, the value of that node."""
    if not method.kinds & POINTS:
        return [site for site in graph.sites if site.kind in method.kinds]
    criteria = _criteria(target)
    if criteria.get("node") is not None and set(method.kinds) == {SUBLAYER}:
        traced = graph.as_traced or graph
        return named_point(traced.nodes, criteria["node"], criteria.get("input") or "")
    return [site for site in graph.points if site.kind in method.kinds]


def _criteria(target: Target) -> Mapping[str, Any]:
    """The target as a mapping; empty if it is only patterns."""
    return target if isinstance(target, Mapping) else {}


def _ancestry(module: str) -> list[str]:
    """The names of the modules that contain a module, outermost first, and its own."""
    parts = module.split(".")
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


def _named_by(pattern: str, names: Sequence[str], site: Site, graph: Graph) -> bool:
    """Whether a pattern matches one of a site's names, or is `all-linear` and the site is a linear layer's."""
    if pattern == ALL_LINEAR:
        linear = site.kind == "linear" or any(s.kind == "linear" for s in layers_beside(site, graph))
        return linear and site.module not in graph.output_heads
    return any(matches(pattern, name) for name in names)


def _patterns(target: Target, graph: Graph) -> tuple[list[str], Callable[[Site], bool]]:
    """What a target says.

    Returns:
        the patterns on names, and whether a site meets the other criteria.
    """
    if not isinstance(target, Mapping):
        return [target] if isinstance(target, str) else list(target), lambda site: True
    criteria = _criteria(target)
    names = criteria.get("name") or "*"
    layers = parse_layers(criteria["layers"]) if criteria.get("layers") else None
    kind, op, node = (criteria.get(key) for key in ("type", "op", "node"))
    roles = roles_in(criteria)

    def wanted(site: Site) -> bool:
        return (
            (kind is None or matches(kind, site.type))
            and (layers is None or layer_of(site.module) in layers)
            and (op is None or matches(op, site.op))
            and (node is None or site.kind == SUBLAYER or node in {use.node for use in site.uses})
            and (not roles or any(matches_any(roles, r) for r in roles_of(site, graph)))
        )

    return [names] if isinstance(names, str) else list(names), wanted


def as_stored(site: WeightSite, graph: Graph) -> WeightSite:
    """The site with the layout that PEFT's `target_parameters` takes, however the model multiplies by the weight.

    That is (out, in) or (experts, out, in), but (experts, in, out) in a module whose `is_transposed` is true.
    Sites that PEFT does not target by parameter stay as they are.
    """
    if not site.by_parameter or len(site.shape) not in (2, 3):
        return site
    owner = graph.source.model.get_submodule(site.module) if graph.source.model is not None else None
    transposed = len(site.shape) == 3 and getattr(owner, "is_transposed", False)
    columns, rows = len(site.shape) - 1, len(site.shape) - 2
    out, inner = (columns, rows) if transposed else (rows, columns)
    kind = "experts" if rows else "linear"
    return replace(site, kind=kind, layout=Layout((out,), (inner,), tuple(range(rows))))


RECOGNISED: Mapping[str, str] = {
    "sub-layer": "a sub-layer is what ends in a matrix product and is added to the stream that it was computed from: "
    "name another point, target: {node: ...} (`--print-after all` shows the nodes)",
    "attention": "an attention is scaled_dot_product_attention, or two products of activations around a softmax",
    "head": "a head is a module that makes an output, or an output `(batch, features)` or `(batch, tokens, features)`",
    "input": "an input is an integer input (batch, seq) that is looked up in an embedding",
}
"""Kind of point -> how such a point is recognised."""


def no_match(graph: Graph, method: Method[Any] | Scheme, selection: Selection[Any]) -> tuple[str, ...]:
    """The message on an entry whose target matches nothing.

    Args:
        graph: the graph.
        method: the method or scheme of the entry.
        selection: what its target gave.

    Returns:
        the message, and notes: what is lacking, what comes near, and which modules the method can be applied to.
    """
    kinds = "/".join(kind for kind in KINDS if kind in method.kinds)
    points = method.kinds & POINTS
    sites = graph.points if points else graph.sites
    layers = kinds if points else f"{kinds} layer"
    notes = [*selection.lacking, *selection.computed]
    notes += [RECOGNISED[kind] for kind in sorted(points) if all(p.kind != kind for p in graph.points)]
    if selection.excluded:
        notes.append(f"`exclude` took out all that matched: {', '.join(selection.excluded[:4])}")
    if selection.near and not selection.computed:
        notes.append(f"near: {', '.join(selection.near)}")
    unused = [p.removeprefix("re:").strip("*.") for p in selection.unused if p.strip("*.")]
    unread = sorted({n.rpartition(".")[0] for n in graph.weights} - {s.module for s in graph.sites})
    hidden = [module for module in unread if any(pattern in module for pattern in unused)]
    if hidden and not selection.computed:
        notes.append(f"on no path to the output: {', '.join(hidden[:4])}")
    modules = list(dict.fromkeys(s.module or "the model itself" for s in sites if s.kind in method.kinds))
    notes.append(f"such layers are: {', '.join(modules[:4]) or 'none'}{', ...' if len(modules) > 4 else ''}")
    return f"{method.name}: the target matches no {layers} of {graph.source.describe}", *notes
