"""Insert an attention method: keys and values are put in front of every attention's own."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher

from adaptc.errors import Fault
from adaptc.ir.analysis.attention import Tokens, find_attentions, keys_of, replace_operand, values_of
from adaptc.ir.analysis.dataflow import VIEWS
from adaptc.ir.graph import Graph
from adaptc.ir.nodes import RESHAPES, evaluated, operation
from adaptc.ir.verify import refresh
from adaptc.methods.point_sites import AttentionSite
from adaptc.methods.virtual_tokens import AttentionMethod
from adaptc.rewriter.expression import splice
from adaptc.rewriter.insert.base import Insert
from adaptc.rewriter.insert.masks import Masks
from adaptc.rewriter.insert.positions import move_positions
from adaptc.rewriter.pipeline import Pass

aten = torch.ops.aten
FLOOR_DIVIDE = cast("Any", operator.floordiv)  # pyright: ignore[reportUnknownMemberType] (untyped in typeshed)


@dataclass(frozen=True)
class InsertAttention(Insert[AttentionMethod, AttentionSite], inserts=AttentionMethod):
    """`softmax(q K^T) V` becomes `softmax(q [P_k; K]^T) [P_v; V]` at every attention the target names."""

    def refused(self, site: AttentionSite) -> Fault | None:
        """The option at fault and why the method cannot be inserted at a site; None if it can."""
        if site.heads is None:
            return Fault(
                (), "it is not clear which axes of its keys and values are heads, tokens and features"
            )
        return super().refused(site)

    def call(self, graph: Graph) -> bool:
        """Put the virtual tokens in front, let every mask show them, and start counting positions after them."""
        sites = self.selection(graph).sites
        method = self.method
        tensors = self.tensors(sites[0], sites)
        theta = self.attached(graph, sites[0], tensors, None)
        marks = [self.recorded(graph, site, tensors) for site in sites]
        values = {argument: node.meta["val"] for argument, node in theta.items()}
        with graph.fake_mode:
            traced = self.traced(method, "tokens", sites[0], method.tokens, [], values)
        first = next(node for node in graph.nodes if node.op == "call_function")
        like = graph.by_name()[sites[0].uses[1].node]
        tokens = splice(graph, traced, list(theta.values()), like, marks[0], before=first)
        put_tokens(graph, method, sites, tokens, method.num_virtual_tokens, self)
        return True


def put_tokens(
    graph: Graph,
    method: AttentionMethod,
    sites: Sequence[AttentionSite],
    tokens: fx.Node,
    count: int | fx.Node,
    source: Pass,
) -> None:
    """Put virtual tokens in front of attentions, let every mask show them, and count positions from behind them.

    Args:
        graph: changed.
        method: says which columns of the tokens an attention reads.
        sites: the attentions.
        tokens: the node of the tokens `(count, columns)`.
        count: how many there are, or the node of this number.
        source: the pass that asks, which refusals name.

    Raises:
        RefusedError: a mask is not understood.
    """
    by_product = {attention.mixed.name: attention for attention in find_attentions(graph.nodes)}
    attentions = [by_product[site.uses[1].node] for site in sites]
    move_positions(graph, attentions, count)
    masks = Masks(graph, count, source)
    starts = method.columns(sites)[:-1]
    for number, (site, attention) in enumerate(zip(sites, attentions, strict=True)):
        masks.widen(attention)
        start = starts[number * method.num_transformer_submodules % len(starts)]
        heads = site.heads
        assert heads is not None
        for real, size in ((keys_of(attention), heads.key), (values_of(attention), heads.value)):
            assert real is not None
            _put_in_front(graph, real, tokens, start, heads.count, size)
            start += heads.count * size
    refresh(graph)


def _put_in_front(graph: Graph, real: Tokens, tokens: fx.Node, start: int, heads: int, size: int) -> None:
    """Let an attention read `[P; K]` in place of its keys or values K, joined along the axis of the tokens.

    P is `heads * size` columns of the virtual `tokens`, from `start` on, the same for each row of the batch.
    """
    node, user = real.node, real.user
    value = node.meta["val"]
    with graph.module.graph.inserting_before(user):

        def call(target: object, *args: Any) -> fx.Node:
            return graph.call(target, *args, like=user)

        flat = call(aten.slice.Tensor, tokens, 1, start, start + heads * size)
        part = call(aten.transpose.int, call(aten.view.default, flat, [-1, heads, size]), 0, 1)
        batch: Any = value.shape[0]
        if isinstance(batch, torch.SymInt):
            batch = call(aten.sym_size.int, node, 0)
        if real.heads is None and heads > 1:
            batch = call(FLOOR_DIVIDE, batch, heads) if isinstance(batch, fx.Node) else batch // heads
        part = call(aten.expand.default, call(aten.unsqueeze.default, part, 0), [batch, -1, -1, -1])
        if real.heads is None:
            part = call(aten.flatten.using_ints, part, 0, 1)
            order = sorted(range(3), key=[0, real.sequence, real.features].__getitem__)
        else:
            order = sorted(range(4), key=[0, real.heads, real.sequence, real.features].__getitem__)
        if order != sorted(order):
            part = call(aten.permute.default, part, order)
        if part.meta["val"].dtype != value.dtype:
            part = call(aten.to.dtype, part, value.dtype)
        joined = call(aten.cat.default, [part, node], real.sequence)
    replace_operand(user, real.argument, joined)
    _resize(graph, user)


def _resize(graph: Graph, node: fx.Node) -> None:
    """Let views of keys or values that name the number of tokens, on their last axis but one, name the larger one."""
    while operation(node) in VIEWS:
        if operation(node) in {*RESHAPES, "expand"}:
            sizes: list[Any] = list(cast("Any", node.args[1]))
            with graph.module.graph.inserting_before(node):
                sizes[-2] = graph.call(aten.sym_size.int, node.args[0], -2, like=node)
            node.update_arg(1, sizes)
        with graph.fake_mode, enable_python_dispatcher(), torch.no_grad():
            node.meta["val"] = evaluated(node)
        (node,) = (user for user in node.users if isinstance(user.meta.get("val"), torch.Tensor))
