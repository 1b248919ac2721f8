"""Points: the sites of a graph that are no weight, where activations, attentions and inputs are adapted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import fx

from adaptc.ir.analysis.attention import Attention, find_attentions, keys_of, values_of
from adaptc.ir.analysis.dataflow import VIEWS, ancestors, is_residual, unviewed, upstream, walk
from adaptc.ir.analysis.roles import weighted_products
from adaptc.ir.nodes import RESHAPES, is_tensor, module_of, node_arg, operation, source_of
from adaptc.methods.point_sites import AnyPoint, AttentionSite, Heads, InputSite, SubLayer
from adaptc.methods.site import ATTENTION_POINT, INPUT, SUBLAYER, Use, WeightSite
from adaptc.patterns import ROLES

OUTPUT, OUT = ROLES[3], ROLES[6]
PASSED = VIEWS | {"dropout", "alias", "detach"}
"""Names of the operations that a residual stream may pass on its way to a sum."""


def find_points(nodes: Iterable[fx.Node], sites: Sequence[WeightSite]) -> tuple[AnyPoint, ...]:
    """Every point of a traced graph, in the order of execution."""
    ordered = list(nodes)
    weighted = weighted_products(ordered, sites)
    points = [*_sublayers(ordered, weighted), *_attentions(ordered), *_inputs(weighted)]
    order = {node.name: index for index, node in enumerate(ordered)}
    return tuple(sorted(points, key=lambda site: order[site.node]))


def named_point(nodes: Iterable[fx.Node], name: str, reads: str) -> list[SubLayer]:
    """The value of a node as a point, adapted wherever it is read.

    Args:
        nodes: of the graph as traced.
        name: of the node.
        reads: the name of the node that an adapter takes as its input; "" for none.

    Returns:
        one point; none if there is no such node, or its value is no activation.
    """
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
    return [
        SubLayer(
            module=module,
            type=type_name,
            kind=SUBLAYER,
            op=operation(node),
            dtype=value.dtype,
            uses=tuple(
                Use(user.name, next((i for i, a in enumerate(user.args) if a is node), -1))
                for user in node.users
            ),
            source=source_of(node),
            width=width if isinstance(width, int) else None,
            reads=reads,
            value=name,
        )
    ]


def _sublayers(nodes: Sequence[fx.Node], weighted: Mapping[fx.Node, WeightSite]) -> Iterator[SubLayer]:
    """Every output of a sub-layer, where it enters the sum with the residual stream that it is computed from."""
    order = {node: index for index, node in enumerate(nodes)}
    mixed = {attention.mixed for attention in find_attentions(nodes)}
    for node in nodes:
        if not is_residual(node) or len(node.all_input_nodes) != 2:
            continue
        for index in (0, 1):
            # both operands are nodes: the sum has two input nodes
            cone = _cone(node_arg(node, index), unviewed(node_arg(node, 1 - index), PASSED), order)
            if cone is not None:
                yield from _outputs(Use(node.name, index), node, cone, weighted, mixed, order)


def _cone(branch: fx.Node, stream: fx.Node, order: Mapping[fx.Node, int]) -> set[fx.Node] | None:
    """The nodes between a residual stream and a branch; None if the branch is not computed from the stream."""
    sources = set(walk([branch], lambda n: n.all_input_nodes, lambda n: order[n] <= order[stream]))
    if branch is stream or stream not in sources:
        return None
    return {node for node in sources if order[node] > order[stream]}


def _outputs(
    use: Use,
    node: fx.Node,
    cone: set[fx.Node],
    weighted: Mapping[fx.Node, WeightSite],
    mixed: set[fx.Node],
    order: Mapping[fx.Node, int],
) -> Iterator[SubLayer]:
    """The sub-layer whose output is one operand of a residual sum; two, if it is itself a sum of parallel sub-layers.

    Args:
        use: the operand.
        node: the sum.
        cone: the nodes between the residual stream and the operand.
        weighted: every matrix product with a weight -> its site.
        mixed: the results of attentions.
        order: node -> its number in the order of execution.
    """
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
    last_layer = weighted[product]
    yield SubLayer(
        module=last_layer.module,
        type=last_layer.type,
        kind=SUBLAYER,
        op=last_layer.op,
        dtype=value.dtype,
        uses=(use,),
        source=source_of(node),
        width=_width(value, last_layer),
        reads=_unflattened(_operand(first, weighted[first]), value.dim()).name,
        role=OUTPUT if cone & mixed else OUT,
    )


def _width(value: torch.Tensor, site: WeightSite) -> int | None:
    """The number of features if they are the last axis; None if not, or if it is symbolic."""
    width: int | torch.SymInt = cast(Any, value).shape[-1]
    return width if isinstance(width, int) and site.kind != "conv" else None


def _unflattened(node: fx.Node, rank: int) -> fx.Node:
    """The input of a matrix product upstream of views that join its rows in one axis."""
    while operation(node) in RESHAPES and node.meta["val"].dim() < rank:
        node = node_arg(node, 0)
    return node


def _operand(product: fx.Node, site: WeightSite) -> fx.Node:
    """The input of a matrix product with a site's weight."""
    weights = {use.node for use in site.uses}
    tensors = [n for n in product.all_input_nodes if is_tensor(n)]
    return next(n for n in tensors if n.name not in weights and unviewed(n).op != "get_attr")


def _attentions(nodes: Sequence[fx.Node]) -> Iterator[AttentionSite]:
    """Every place where keys and values enter an attention."""
    attentions = list(find_attentions(nodes))
    batches = [n.meta["val"].shape[0] for n in nodes if n.op == "placeholder" and n.meta["val"].dim()]
    crossing = {_length(a.query) for a in attentions if _crosses(a)}
    for attention in attentions:
        keys, values = keys_of(attention), values_of(attention)
        module, type_name = module_of(attention.mixed)
        heads: Heads | None = None
        if keys is not None and values is not None:
            count = keys.count(batches)
            if count is not None and count == values.count(batches):
                heads = Heads(count, keys.size, values.size)
        yield AttentionSite(
            module=module,
            type=type_name,
            kind=ATTENTION_POINT,
            op=operation(attention.softmax),
            dtype=attention.mixed.meta["val"].dtype,
            uses=(Use(attention.scores.name, 1), Use(attention.mixed.name, 1)),
            source=source_of(attention.mixed),
            heads=heads,
            half=_half(attention, crossing),
        )


def _half(attention: Attention, crossing: set[str]) -> str:
    """`encoder`, `decoder` or `cross`: which part of an encoder-decoder an attention is in; "" in any other model."""
    if not crossing:
        return ""
    if _crosses(attention):
        return "cross"
    return "decoder" if _length(attention.query) in crossing else "encoder"


def _length(query: fx.Node) -> str:
    """The number of tokens of a query, as text: it may be symbolic."""
    return str(query.meta["val"].shape[-2])


def _crosses(attention: Attention) -> bool:
    """Whether the keys belong to another sequence than the query: one of another length."""
    keys = keys_of(attention)
    return keys is not None and str(keys.node.meta["val"].shape[keys.sequence]) != _length(attention.query)


def _inputs(weighted: Mapping[fx.Node, WeightSite]) -> Iterator[InputSite]:
    """Every embedding that turns an integer input of the model into vectors."""
    for node, site in weighted.items():
        if site.kind != "embedding":
            continue
        indices = unviewed(node_arg(node, 1))
        if indices.op == "placeholder" and indices.meta["val"].dim() == 2:
            value = node.meta["val"]
            yield InputSite(
                module=site.module,
                type=site.type,
                kind=INPUT,
                op=site.op,
                dtype=value.dtype,
                uses=(Use(node.name, 1),),
                source=site.source,
                table=site.parameter,
                leaf=site.leaf,
                width=value.shape[-1],
                ids=indices.name,
            )
