"""Attention as ONNX Runtime's GroupQueryAttention, whose keys and values can stay in one buffer."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import fx

from adaptc.emit.onnx.probes import Probes
from adaptc.emit.onnx.rotary import Rotated, rotated
from adaptc.emit.onnx.standard_attention import (
    Keys,
    behind_virtual_tokens,
    drop_unread,
    full_mask,
    give,
    read_keys,
    unlike_standard,
)
from adaptc.ir.analysis.attention import Attention, find_attentions, keys_of, values_of
from adaptc.ir.analysis.dataflow import walk
from adaptc.ir.graph import Graph
from adaptc.ir.nodes import RESHAPES, arguments_by_name, keeps_shape, operation
from adaptc.rewriter.cache.cache import token_ids
from adaptc.rewriter.cache.past import PAST, TOTAL
from adaptc.rewriter.pipeline import Pass
from adaptc.weights import Held

aten = torch.ops.aten
onnx: Any = torch.ops.adaptc_onnx


@dataclass(frozen=True)
class GroupedAttention(Pass):
    """Attention with a past becomes GroupQueryAttention, for sequences that are padded on the right, if at all.

    Where its mask says that a token sees all of the past, or so many tokens, it needs no mask: it counts the tokens of
    each sequence. It then rotates queries and keys itself, where they are rotated by a table of positions. With any
    other mask it adds that to the scores.
    """

    name: ClassVar[str] = "grouped-attention"
    takes: ClassVar[frozenset[str]] = frozenset({"evaluated"})
    changes_results: ClassVar[bool] = True

    def call(self, graph: Graph) -> bool:
        """Replace every attention that has the form."""
        attentions = [a for a in find_attentions(graph.nodes) if unlike_grouped(a) is None]
        if not attentions:
            return False
        grouping = _Grouping(graph, Probes(graph))
        readings = [grouping.read(attention) for attention in attentions]
        for reading in readings:
            grouping.replace(reading)
        graph.module.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
        drop_unread(graph)
        return True


def unlike_grouped(attention: Attention) -> str | None:
    """Why GroupQueryAttention does not compute an attention; None if it does."""
    reason = unlike_standard(attention)
    if reason is not None:
        return reason
    key, value = _keys(attention)
    size, others = attention.query.meta["val"].shape[-1], attention.value.meta["val"].shape[-1]
    if key.past is None or value.past is None:
        if behind_virtual_tokens(keys_of(attention)):
            return "virtual tokens are in front of its past, and it takes several tokens behind a past of one row only"
        return "its keys are not those of the past and the new tokens alone"
    if size != others or size % 8:
        return f"the size of a head is {size}, and {others} of the values; a multiple of 8 is needed"
    return None


def _keys(attention: Attention) -> tuple[Keys, Keys]:
    return (
        read_keys(attention, keys_of(attention), attention.key),
        read_keys(attention, values_of(attention), attention.value),
    )


@dataclass(frozen=True)
class _Reading:
    """One attention, read before any is replaced.

    Attributes:
        attention: the attention.
        query: its query, before it is rotated where `tables` are given.
        key: its new keys, likewise.
        bias: the mask that is added to the scores; None where the tokens are counted.
        window: how many tokens back a token sees; 0 for all.
        tables: cosines and sines by position; None where queries and keys are rotated in the graph, or not at all.
    """

    attention: Attention
    query: fx.Node
    key: fx.Node
    bias: fx.Node | None
    window: int = 0
    tables: tuple[torch.Tensor, torch.Tensor] | None = None


@dataclass
class _Grouping:
    """The replacement of the attentions of one graph.

    Attributes:
        graph: rewritten in place.
        probes: what its masks and tables are.
    """

    graph: Graph
    probes: Probes
    counts: dict[bool, tuple[fx.Node, fx.Node]] = field(default_factory=dict[bool, tuple[fx.Node, fx.Node]])
    tables: list[tuple[torch.Tensor, fx.Node]] = field(default_factory=list[tuple[torch.Tensor, fx.Node]])
    biases: dict[fx.Node, fx.Node] = field(default_factory=dict[fx.Node, fx.Node])

    def read(self, attention: Attention) -> _Reading:
        """What an attention's mask and rotation are."""
        mask, (key, _) = arguments_by_name(attention.mixed)["attn_mask"], _keys(attention)
        window = 0 if mask is None else self.probes.window(mask)
        if window is None:
            return _Reading(attention, attention.query, key.new, mask)
        query, new_key = rotated(attention.query), rotated(key.new)
        tables = self._tables(query, new_key) if query is not None and new_key is not None else None
        if query is None or new_key is None or tables is None:
            return _Reading(attention, attention.query, key.new, None, window)
        return _Reading(attention, query.x, new_key.x, None, window, tables)

    def _tables(self, query: Rotated, key: Rotated) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The cosines and sines that rotate queries and keys alike; None if that is no table of positions."""
        longest, size = longest_text(self.graph), query.x.meta["val"].shape[-1]
        if longest is None or size % 16:
            return None
        cos, sin, *others = (
            self.probes.table(part, longest) for part in (query.cos, query.sin, key.cos, key.sin)
        )
        if cos is None or sin is None or cos.shape[-1] * 2 != size:
            return None
        alike = all(
            o is not None and torch.equal(o, new_key) for o, new_key in zip(others, (cos, sin), strict=True)
        )
        return (cos, sin) if alike else None

    def replace(self, reading: _Reading) -> None:
        """Put GroupQueryAttention in the place of an attention."""
        node, (key, value) = reading.attention.mixed, _keys(reading.attention)
        heads, kv_heads = reading.query.meta["val"].shape[1], key.new.meta["val"].shape[1]
        size, scale = reading.query.meta["val"].shape[-1], arguments_by_name(node)["scale"]
        counts = self._counts(counted=reading.bias is None)
        tables = [self._table(t) for t in reading.tables] if reading.tables is not None else [None, None]
        with self.graph.module.graph.inserting_before(node):
            parts = [self._flat(part) for part in (reading.query, reading.key, value.new)]
            bias = self._bias(reading) if reading.bias is not None else None
            cap = arguments_by_name(node).get("softcap")
            factor = float(size**-0.5 if scale is None else scale)
            options = (heads, kv_heads, factor, reading.window or -1, *([cap] if cap else []))
            results = self._call(
                onnx.grouped_attention.default, *parts, key.past, value.past, *counts, *tables, bias, *options
            )
            y, keys, values = (self._call(operator.getitem, results, number) for number in range(3))
            for flat in _flattened(node, y):
                flat.replace_all_uses_with(y)
            sizes = [*(self._call(aten.sym_size.int, y, axis) for axis in (0, 1)), heads, size]
            mixed = self._call(aten.transpose.int, self._call(aten.reshape.default, y, sizes), 1, 2)
        node.replace_all_uses_with(mixed)
        self.graph.module.graph.erase_node(node)
        give(cast(fx.Node, key.joined), keys)
        give(cast(fx.Node, value.joined), values)

    def _call(self, target: Any, *args: Any) -> fx.Node:
        like = next(a for a in args if isinstance(a, fx.Node))
        return self.graph.call(target, *args, like=like)

    def _flat(self, x: fx.Node) -> fx.Node:
        """`(batch, tokens, heads * size)` of `(batch, heads, tokens, size)`."""
        heads, size = x.meta["val"].shape[1], x.meta["val"].shape[3]
        apart = _operand(x) if _swaps(x) else None
        if apart is not None and operation(apart) in {*RESHAPES, "unflatten"}:
            source = _operand(apart)
            if source.meta["val"].dim() == 3 and source.meta["val"].shape[-1] == heads * size:
                return source
        apart = apart or self._call(aten.transpose.int, x, 1, 2)
        sizes = [*(self._call(aten.sym_size.int, apart, axis) for axis in (0, 1)), heads * size]
        return self._call(aten.reshape.default, apart, sizes)

    def _bias(self, reading: _Reading) -> fx.Node:
        """A mask as what is added to the scores."""
        mask = cast(fx.Node, reading.bias)
        if mask not in self.biases:
            bias = cast(fx.Node, full_mask(self.graph, reading.attention, mask))
            dtype = reading.query.meta["val"].dtype
            if bias.meta["val"].dtype == torch.bool:
                bias = self._call(aten.where.Scalar, bias, 0.0, torch.finfo(dtype).min)
            if bias.meta["val"].dim() == 2:
                bias = self._call(aten.unsqueeze.default, self._call(aten.unsqueeze.default, bias, 0), 0)
            self.biases[mask] = self._call(aten.to.dtype, bias, dtype)
        return self.biases[mask]

    def _counts(self, counted: bool) -> tuple[fx.Node, fx.Node]:
        """The index of the last token of each sequence, and the number of tokens of the longest.

        Args:
            counted: by the mask; else padding counts as tokens, and a mask hides it.
        """
        if counted not in self.counts:
            ids, mask = cast(fx.Node, token_ids(self.graph)), self._padding()
            with self.graph.module.graph.inserting_before(_first(self.graph)):
                if mask is not None:
                    total = self._call(aten.sym_size.int, mask, 1)
                else:
                    sizes = (self._call(aten.sym_size.int, n, a) for n, a in ((self._past(), 2), (ids, 1)))
                    total = self._call(operator.add, *sizes)
                if mask is not None and counted:
                    lengths = self._call(aten.sum.dim_IntList, mask, [1])
                else:
                    batch = self._call(aten.sym_size.int, ids, 0)
                    lengths = self._call(aten.full.default, [batch], total)
                last = self._call(aten.to.dtype, self._call(aten.sub.Tensor, lengths, 1), torch.int32)
                whole = self._call(aten.to.dtype, self._call(aten.scalar_tensor.default, total), torch.int32)
            self.counts[counted] = last, whole
        return self.counts[counted]

    def _padding(self) -> fx.Node | None:
        """The input that says which tokens are padding."""
        specs = zip(self.graph.placeholders, self.graph.inputs, strict=True)
        return next((node for node, spec in specs if spec.dims[1:] == (TOTAL,)), None)

    def _past(self) -> fx.Node:
        """An input of keys or values of past tokens."""
        specs = zip(self.graph.placeholders, self.graph.inputs, strict=True)
        return next(node for node, spec in specs if PAST in spec.dims)

    def _table(self, table: torch.Tensor) -> fx.Node:
        """The weight that holds a table."""
        for other, node in self.tables:
            if torch.equal(other, table):
                return node
        name = f"rotary_table_{len(self.tables)}"
        self.graph.attach(name, Held(table), trained=False)
        self.tables.append((table, self.graph.parameter_node(name)))
        return self.tables[-1][1]


def _flattened(node: fx.Node, like: fx.Node) -> list[fx.Node]:
    """The values that give an attention's result its tokens first and its heads side by side, as `like` has them."""
    tokens_first = [u for same in _same(node) for u in same.users if _swaps(u)]
    wanted = str(like.meta["val"].shape)
    return [
        user
        for value in tokens_first
        for same in _same(value)
        for user in same.users
        if operation(user) in {*RESHAPES, "flatten"} and str(user.meta["val"].shape) == wanted
    ]


def _same(node: fx.Node) -> list[fx.Node]:
    """A node, and the views and copies of it that have its shape."""
    views = RESHAPES | {"contiguous", "clone"}
    return list(walk([node], lambda n: [u for u in n.users if operation(u) in views and keeps_shape(u)]))


def _swaps(node: fx.Node) -> bool:
    return operation(node) == "transpose" and set(node.args[1:]) == {1, 2}


def longest_text(graph: Graph) -> int | None:
    """How many tokens the longest text has that a Hugging Face model is made for; None of any other model."""
    pretrained = graph.source.pretrained
    config = pretrained.config.get_text_config(decoder=True) if pretrained is not None else None
    return getattr(config, "max_position_embeddings", None)


def _operand(node: fx.Node) -> fx.Node:
    return cast(fx.Node, node.args[0])


def _first(graph: Graph) -> fx.Node:
    return next(node for node in graph.nodes if node.op == "call_function")
