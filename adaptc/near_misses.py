"""A target that matches nothing: what there is instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adaptc.graph import Graph
from adaptc.method_contract import Method
from adaptc.point_sites import AnyPoint
from adaptc.scheme_contract import Scheme
from adaptc.select import Selection
from adaptc.site import KINDS, POINTS

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
