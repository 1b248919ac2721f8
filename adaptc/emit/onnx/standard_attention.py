"""Attention as ONNX's own operation, with the keys and values of the past where there is a cache."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from adaptc.ir.analysis.attention import SAME, Attention, Tokens, find_attentions, keys_of, values_of
from adaptc.ir.graph import Graph
from adaptc.ir.nodes import RESHAPES, arguments_by_name, list_arg, operation, size_expression
from adaptc.rewriter.pipeline import Pass

aten = torch.ops.aten
onnx: Any = torch.ops.adaptc_onnx
VIEWS = SAME | RESHAPES | {"unsqueeze", "expand", "flatten", "transpose", "repeat_interleave"}
"""Operations between keys and the attention that reads them."""
RUN = (torch.float32, torch.float16, torch.bfloat16)
"""The dtypes that ONNX Runtime has the operation for; bfloat16 is computed in float32."""


@dataclass(frozen=True)
class StandardAttention(Pass):
    """`softmax(scale q kᵀ + mask) v` becomes ONNX's Attention, which repeats no heads and copies no scores.

    Where keys and values are joined with those of the past for it alone, it joins them itself. An attention that is not
    one operation in the graph stays as it is.
    """

    name: ClassVar[str] = "standard-attention"
    takes: ClassVar[frozenset[str]] = frozenset({"evaluated"})
    changes_results: ClassVar[bool] = True

    def call(self, graph: Graph) -> bool:
        """Replace every attention that has the form."""
        attentions = [a for a in find_attentions(graph.nodes) if unlike_standard(a) is None]
        for attention in attentions:
            node = attention.mixed
            with graph.module.graph.inserting_before(node):
                result = _replacement(graph, attention)
            node.replace_all_uses_with(result)
            graph.module.graph.erase_node(node)
        return bool(attentions)


def unlike_standard(attention: Attention) -> str | None:
    """Why ONNX's Attention does not compute an attention; None if it does."""
    if not attention.fused:
        return "it is written out in several operations that are not exactly one attention"
    q, k, v = (node.meta["val"] for node in (attention.query, attention.key, attention.value))
    options = arguments_by_name(attention.mixed)
    if not q.dim() == k.dim() == v.dim() == 4:
        return "its heads share an axis with the batch"
    if q.dtype not in RUN:
        return f"ONNX Runtime has no Attention in {str(q.dtype).removeprefix('torch.')}"
    if options["dropout_p"]:
        return "it drops some of the shares"
    batches = {size_expression(value.shape[0]) for value in (q, k, v)}
    if len(batches) > 1:
        return "its keys are repeated for the rows of a batch"
    if options["is_causal"] and _size(q, 2) != _size(k, 2):
        return "it is causal, with fewer queries than keys"
    mask = options["attn_mask"]
    if mask is not None and not 2 <= mask.meta["val"].dim() <= 4:
        return f"its mask has {mask.meta['val'].dim()} axes"
    return None


@dataclass(frozen=True)
class Keys:
    """The keys or values of an attention, before heads are repeated.

    Attributes:
        new: those of the new tokens; of all tokens where `past` is None.
        past: the input with those of the past.
        joined: the two joined, which the graph gives.
    """

    new: fx.Node
    past: fx.Node | None = None
    joined: fx.Node | None = None


def read_keys(attention: Attention, tokens: Tokens | None, direct: fx.Node) -> Keys:
    """The keys or values of an attention, apart from the past where they are joined for it alone.

    Args:
        attention: the attention, in one operation.
        tokens: where they are before heads are repeated.
        direct: what the operation reads.
    """
    if tokens is None or (tokens.heads, tokens.sequence, tokens.features) != (1, 2, 3):
        return Keys(direct)
    node = tokens.node
    parts: Any = node.args[0] if operation(node) == "cat" and node.args[1:] == (2,) else ()
    if len(parts) == 2 and parts[0].op == "placeholder" and _read_by(node, attention.mixed):
        return Keys(parts[1], parts[0], node)
    return Keys(node)


def behind_virtual_tokens(tokens: Tokens | None) -> bool:
    """Whether others stand in front of the keys or values of the past."""
    joined = _joined(tokens.node) if tokens is not None else []
    return any(part.op == "placeholder" for later in joined[1:] for part in (later, *_joined(later)))


def _joined(node: fx.Node) -> list[fx.Node]:
    """The values that a node joins."""
    return list_arg(node, 0) if operation(node) == "cat" else []


def _read_by(node: fx.Node, attention: fx.Node) -> bool:
    """Whether a value is read by one attention alone, through views, beside the outputs."""
    return all(
        user is attention or user.op == "output" or (operation(user) in VIEWS and _read_by(user, attention))
        for user in node.users
    )


def _replacement(graph: Graph, attention: Attention) -> fx.Node:
    node = attention.mixed
    options = arguments_by_name(node)
    mask = full_mask(graph, attention, options["attn_mask"])
    size = attention.query.meta["val"].shape[-1]
    scale = float(size**-0.5 if options["scale"] is None else options["scale"])
    cap = [options["softcap"]] if options.get("softcap") else []
    key = read_keys(attention, keys_of(attention), attention.key)
    value = read_keys(attention, values_of(attention), attention.value)
    if key.joined is None or value.joined is None:
        k, v = key.joined or key.new, value.joined or value.new
        operands = (attention.query, k, v, mask, scale, options["is_causal"], *cap)
        return graph.call(onnx.attention.default, *operands, like=node)
    parts = (attention.query, key.new, value.new, mask, key.past, value.past, scale, *cap)
    results = graph.call(onnx.cached_attention.default, *parts, like=node)
    mixed, keys, values = (graph.call(operator.getitem, results, n, like=node) for n in range(3))
    give(key.joined, keys)
    give(value.joined, values)
    return mixed


def give(joined: fx.Node, present: fx.Node) -> None:
    """Let the graph give the keys or values that an attention has joined."""
    joined.replace_all_uses_with(present, delete_user_cb=lambda user: user.op == "output")


def full_mask(graph: Graph, attention: Attention, mask: fx.Node | None) -> fx.Node | None:
    """The mask with an axis for the heads, and an entry for each query and each key."""
    if mask is None:
        return None
    if mask.meta["val"].dim() == 3:
        mask = graph.call(aten.unsqueeze.default, mask, 0, like=attention.mixed)
    rows, columns = (_size(node.meta["val"], 2) for node in (attention.query, attention.key))
    if [_size(mask.meta["val"], axis) for axis in (-2, -1)] == [rows, columns]:
        return mask
    sizes = [graph.call(aten.sym_size.int, n, 2, like=n) for n in (attention.query, attention.key)]
    leading = [-1] * (mask.meta["val"].dim() - 2)
    return graph.call(aten.expand.default, mask, [*leading, *sizes], like=attention.mixed)


def _size(value: torch.Tensor, axis: int) -> Any:
    return size_expression(value.shape[axis])


def drop_unread(graph: Graph) -> None:
    """Remove inputs that nothing reads any more."""
    pairs = list(zip(graph.placeholders, graph.inputs, strict=True))
    graph.inputs = tuple(spec for node, spec in pairs if node.users)
    for node, _ in pairs:
        if not node.users:
            graph.module.graph.erase_node(node)
