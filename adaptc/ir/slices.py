"""What a site of a graph does in the model, and the slices of a fused weight that do something of their own."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from adaptc.ir.analysis.roles import PIECES, SLICES
from adaptc.ir.graph import Graph
from adaptc.methods.point_sites import AttentionSite, Point, Site, SubLayer
from adaptc.methods.site import MATRIX_KINDS, WeightSite
from adaptc.patterns import matches_any


def roles_of(site: Site, graph: Graph) -> Collection[str]:
    """What a site does: the role of a point, or the roles of a weight, of a parameter those of its module's layers."""
    if isinstance(site, SubLayer):
        return [site.role] if site.role else []
    if isinstance(site, AttentionSite):
        return [site.half] if site.half else []
    if isinstance(site, Point):
        return []
    if site.kind == "parameter":
        return {role for s in layers_beside(site, graph) for role in graph.roles.of.get(s.uses[0], ())}
    return graph.roles.of.get(site.uses[0], ())


def layers_beside(site: Site, graph: Graph) -> list[WeightSite]:
    """The layers of the module that a parameter belongs to."""
    return [s for s in graph.sites if s.module == site.module and s.kind in MATRIX_KINDS]


def roles_in(criteria: Mapping[str, Any]) -> tuple[str, ...]:
    """The patterns of roles that a target's mapping names, one or several; empty if it names none."""
    roles: Any = criteria.get("role") or ()
    return (roles,) if isinstance(roles, str) else tuple(roles)


def slices_with_role(site: Site, roles: Sequence[str], graph: Graph) -> list[Site]:
    """The slices of a fused weight whose rows play a role, given as patterns; the site itself if there are none."""
    if not roles or not isinstance(site, WeightSite) or site.rows:
        return [site]
    played = sorted(r for r in roles_of(site, graph) if matches_any(roles, r))
    slices = [
        replace(site, rows=rows, piece=PIECES[r])
        for r in played
        if (rows := graph.roles.rows.get((site.uses[0], r)))
    ]
    return list[Site](slices) if slices and len(slices) == len(played) else [site]


def site_slices(site: Site, slices: Sequence[str], graph: Graph) -> list[Site]:
    """The slices of a fused weight.

    Args:
        site: a weight; a point has no slices.
        slices: their names, such as `q`, `gate`, or rows `0:512`; one that the weight does not have is left out.
        graph: the graph.
    """
    parts: list[Site] = []
    if not isinstance(site, WeightSite):
        return parts
    for name in slices:
        first, colon, last = name.partition(":")
        if colon:
            rows = ((int(first or 0), int(last or site.out_features)),)
            name = f"{rows[0][0]}:{rows[0][1]}"
            rows = rows if rows[0][1] <= site.out_features else ()
        else:
            rows = graph.roles.rows.get((site.uses[0], SLICES[name]), ())
        if rows and all(start < stop for start, stop in rows):
            parts.append(replace(site, rows=rows, piece=name))
    return parts
