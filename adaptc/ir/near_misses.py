"""What a target names and a model lacks, and what comes near it: for the message on a target that matches nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from adaptc.errors import nearest
from adaptc.ir.analysis.roles import PIECES
from adaptc.ir.graph import Graph
from adaptc.ir.slices import roles_in, roles_of, site_slices
from adaptc.methods.point_sites import Site
from adaptc.methods.site import KINDS, WeightSite
from adaptc.patterns import SLICE_NAMES, matches


def lacking_slices(sought: Mapping[str, Sequence[Site]], graph: Graph) -> Iterator[str]:
    """A message for every slice that none of the layers named has.

    Args:
        sought: name of a slice -> the sites that the target wants it of.
        graph: the graph.
    """
    for piece, sites in sought.items():
        if any(site_slices(site, [piece], graph) for site in sites):
            continue
        first = sites[0]
        if not isinstance(first, WeightSite):
            yield f"{first.module}[{piece}] is no slice: a {first.kind} has none"
            continue
        names = [PIECES[role] for use, role in graph.roles.rows if use == first.uses[0] and role in PIECES]
        listed = ", ".join(sorted(names, key=SLICE_NAMES.index))
        reason = f"its slices are {listed}" if names else "it is not fused"
        yield f"{first.module}[{piece}] is no slice: {reason}, and it has rows 0:{first.out_features}"


def lacking_criteria(criteria: Mapping[str, Any], candidates: Sequence[Site], graph: Graph) -> Iterator[str]:
    """A message for a role, a node or an operation that no site has, with those that there are.

    Args:
        criteria: the target's keys `role`, `node` and `op`.
        candidates: the sites that the method can be applied to.
        graph: the graph.
    """
    wanted = roles_in(criteria)
    if wanted:
        roles = sorted({role for site in candidates for role in roles_of(site, graph)})
        named = ", ".join(map(repr, wanted))
        yield f"role {named}: the layers here are {', '.join(roles) or 'of none'}"
    if criteria.get("node"):
        nodes = [node.name for node in graph.nodes if node.op == "call_function"]
        similar = ", ".join(nearest(criteria["node"], nodes, 3)) or "none of that spelling"
        yield (
            f"node {criteria['node']!r}: no operation gives such a value; near: {similar} "
            "(`--print-after all` shows the nodes)"
        )
    if criteria.get("op"):
        operations = sorted({site.op for site in candidates})
        yield f"op {criteria['op']!r}: the operations here are {', '.join(operations) or 'none'}"


def similar_modules(
    graph: Graph, unused: Sequence[str], candidates: Sequence[Site], kinds: Collection[str]
) -> tuple[str, ...]:
    """The names of modules that come near a pattern, six at most.

    Args:
        graph: the graph.
        unused: the patterns, which matched no site.
        candidates: the sites that the method can be applied to.
        kinds: their kinds.

    Returns:
        modules that match but are of another kind, else those with a similar name; and those that end as the pattern
        does.
    """
    modules = list(dict.fromkeys(site.module for site in candidates))
    by_leaf = {module.rpartition(".")[2]: module for module in modules}
    similar: list[str] = []
    other = "/".join(kind for kind in KINDS if kind in kinds)
    for pattern in unused:
        other_kinds = [
            f"{s.module} ({s.type}, not {other})" for s in graph.parameter_sites if matches(pattern, s.module)
        ][:2]
        leaf = pattern.removeprefix("re:").rpartition(".")[2].strip("*$^\\")
        ending = [m for m in modules if matches("*." + pattern, m)]
        if ending:
            similar.append(f"'*.{pattern}' matches {len(ending)} of them")
        similar += (
            other_kinds or nearest(pattern, modules, 2) or [by_leaf[n] for n in nearest(leaf, by_leaf, 2)]
        )
        similar += ending[:2]
    return tuple(dict.fromkeys(similar))[:6]
