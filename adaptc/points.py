"""Points: the places of a graph that are no weight, where activations, attentions and inputs are adapted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from adaptc.attention import Attention, find_attentions, keys_of, values_of
from adaptc.dataflow import VIEWS, ancestors, is_residual, unviewed, upstream, walk
from adaptc.names import ROLES
from adaptc.nodes import operation
from adaptc.roles import weighted_products
from adaptc.sites import Site, Use, module_of, source_of

SUBLAYER = "sub-layer"
POINTS = frozenset({SUBLAYER, "attention", "input"})
"""The kinds of site that are points."""
OUTPUT, OUT = ROLES[3], ROLES[6]
WHOLE = -1
"""In place of an argument: the value of the node itself, wherever it is read."""
PASSED = VIEWS | {"dropout", "alias", "detach"}
"""What a residual stream may pass on its way to a sum."""


def find_points(nodes: Iterable[fx.Node], sites: Sequence[Site]) -> tuple[Site, ...]:
    """Every point of a traced graph, in the order of execution."""
    ordered = list(nodes)
    weighted = weighted_products(ordered, sites)
    found = [*_sublayers(ordered, weighted), *_attentions(ordered), *_inputs(weighted)]
    order = {node.name: index for index, node in enumerate(ordered)}
    return tuple(sorted(found, key=lambda site: order[site.uses[0].node]))


def named_point(nodes: Iterable[fx.Node], name: str, reads: str) -> list[Site]:
    """The value of a node as a place to adapt, wherever it is read; none where it is no activation."""
    by_name = {node.name: node for node in nodes}
    node = by_name.get(name)
    value = node.meta.get("val") if node is not None else None
    if (
        node is None
        or not isinstance(value, torch.Tensor)
        or node.op != "call_function"
        or reads not in ("", *by_name)
    ):
        return []
    module, type_name = module_of(node)
    width = value.shape[-1] if value.dim() else None
    shape = (width,) if isinstance(width, int) else ()
    return [
        Site.point(
            module=module,
            type=type_name,
            kind=SUBLAYER,
            op=operation(node),
            shape=shape,
            dtype=value.dtype,
            uses=(Use(name, WHOLE),),
            source=source_of(node),
            reads=reads,
        )
    ]


def _sublayers(nodes: Sequence[fx.Node], weighted: Mapping[fx.Node, Site]) -> Iterator[Site]:
    """A sub-layer's output, where it enters the sum with the residual stream that it was computed from."""
    order = {node: index for index, node in enumerate(nodes)}
    mixed = {attention.mixed for attention in find_attentions(nodes)}
    for node in nodes:
        if not is_residual(node) or len(node.all_input_nodes) != 2:
            continue
        for index, stream in ((0, node.args[1]), (1, node.args[0])):
            cone = _cone(node.args[index], unviewed(stream, PASSED), order)  # type: ignore[arg-type]
            if cone is not None:
                yield from _outputs(Use(node.name, index), node, cone, weighted, mixed, order)


def _cone(branch: Any, stream: fx.Node, order: Mapping[fx.Node, int]) -> set[fx.Node] | None:
    """What a branch is made from behind the stream; None if it is not made from that."""
    made_from = set(walk([branch], lambda n: n.all_input_nodes, lambda n: order[n] <= order[stream]))
    if branch is stream or stream not in made_from:
        return None
    return {node for node in made_from if order[node] > order[stream]}


def _outputs(
    use: Use,
    node: fx.Node,
    cone: set[fx.Node],
    weighted: Mapping[fx.Node, Site],
    mixed: set[fx.Node],
    order: Mapping[fx.Node, int],
) -> Iterator[Site]:
    """The sub-layer at one operand of a sum; of parallel ones that were summed before, each."""
    branch: Any = node.args[use.argument]
    last = [n for n in upstream([branch]) if n in weighted and n in cone]
    if not last or branch.meta["val"].dim() < 2:
        return
    if is_residual(branch):
        parts = [(Use(branch.name, i), ancestors(a, cone)) for i, a in enumerate(branch.args[:2])]
        if len({bool(part & mixed) for _, part in parts}) == 2:
            for each, part in parts:
                yield from _outputs(each, branch, part, weighted, mixed, order)
            return
    product = max(last, key=order.__getitem__)
    first = min((n for n in cone if n in weighted), key=order.__getitem__)
    value = branch.meta["val"]
    yield replace(
        weighted[product].as_point(SUBLAYER, _width(value, weighted[product]), value.dtype, source_of(node)),
        uses=(use,),
        role=OUTPUT if cone & mixed else OUT,
        reads=_unflattened(_operand(first, weighted[first]), value.dim()).name,
    )


def _width(value: torch.Tensor, site: Site) -> tuple[int, ...]:
    """The number of features, if they are on the last axis; empty if not."""
    width = value.shape[-1]
    return (width,) if isinstance(width, int) and site.kind != "conv" else ()


def _unflattened(node: fx.Node, rank: int) -> fx.Node:
    """A product's input before its rows were put in one axis."""
    while operation(node) in ("view", "reshape") and node.meta["val"].dim() < rank:
        node = node.args[0]  # type: ignore[assignment]
    return node


def _operand(product: fx.Node, site: Site) -> fx.Node:
    """What a product multiplies its weight with."""
    weights = {use.node for use in site.uses}
    held = [n for n in product.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    return next(n for n in held if n.name not in weights and unviewed(n).op != "get_attr")


def _attentions(nodes: Sequence[fx.Node]) -> Iterator[Site]:
    """Where the keys and the values enter an attention; its shape is (heads, size of a key, size of a value)."""
    found = list(find_attentions(nodes))
    batches = [n.meta["val"].shape[0] for n in nodes if n.op == "placeholder" and n.meta["val"].dim()]
    crossing = {_length(a.query) for a in found if _crosses(a)}
    for attention in found:
        keys, values = keys_of(attention), values_of(attention)
        module, type_name = module_of(attention.mixed)
        shape: tuple[int, ...] = ()
        if keys is not None and values is not None:
            heads = keys.count(batches)
            alike = heads is not None and heads == values.count(batches)
            shape = (heads, keys.size, values.size) if heads is not None and alike else ()
        yield Site.point(
            module=module,
            type=type_name,
            kind="attention",
            op=operation(attention.softmax),
            shape=shape,
            dtype=attention.mixed.meta["val"].dtype,
            uses=(Use(attention.scores.name, 1), Use(attention.mixed.name, 1)),
            source=source_of(attention.mixed),
            role=_half(attention, crossing),
        )


def _half(attention: Attention, crossing: set[str]) -> str:
    """Which part of a model of two an attention is in; "" where there is one."""
    if not crossing:
        return ""
    if _crosses(attention):
        return "cross"
    return "decoder" if _length(attention.query) in crossing else "encoder"


def _length(query: fx.Node) -> str:
    """How many tokens a query has, in words."""
    return str(query.meta["val"].shape[-2])


def _crosses(attention: Attention) -> bool:
    """Whether the keys are another sequence's: of another length."""
    keys = keys_of(attention)
    return keys is not None and str(keys.node.meta["val"].shape[keys.sequence]) != _length(attention.query)


def _inputs(weighted: Mapping[fx.Node, Site]) -> Iterator[Site]:
    """Where tokens that are given as numbers become vectors."""
    for node, site in weighted.items():
        if site.kind != "embedding":
            continue
        indices = unviewed(node.args[1])  # type: ignore[arg-type]
        if indices.op == "placeholder" and indices.meta["val"].dim() == 2:
            value = node.meta["val"]
            point = site.as_point("input", tuple(value.shape[-1:]), value.dtype, site.source)
            yield replace(point, uses=(Use(node.name, 1),), reads=indices.name)
