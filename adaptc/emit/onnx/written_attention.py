"""Attention that a model writes out in several operations, as one operation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import fx

from adaptc.emit.onnx.einsum_attention import spelled_with_matmul
from adaptc.emit.onnx.standard_attention import unlike_standard
from adaptc.ir.analysis.attention import SAME, Attention, find_attentions
from adaptc.ir.graph import Graph
from adaptc.ir.nodes import keeps_shape, operation
from adaptc.rewriter.pipeline import Pass

aten = torch.ops.aten
onnx: Any = torch.ops.adaptc_onnx
CASTS = ("type_as", "float", "half")
"""Operations that change the dtype alone, beside `to`."""
HIDES = -1e9
"""A score of no more than this is hidden: adding it to a score and putting it in its place are the same."""


@dataclass(frozen=True)
class Written:
    """What the operations between scores and values are.

    Attributes:
        scale: what the scores are multiplied by.
        softcap: `c` of `c tanh(scores / c)`; 0 without.
        masks: what is added to the scores after that.
    """

    scale: float
    softcap: float = 0.0
    masks: list[tuple[fx.Node, bool]] = field(default_factory=list[tuple[fx.Node, bool]])


@dataclass(frozen=True)
class FusedAttention(Pass):
    """`softmax(c tanh(scale q kᵀ / c) + mask) v`, written out, becomes one operation; the cap may be missing.

    Only what is exactly this is taken: scores that are scaled by a number, capped, then masked; a softmax along the
    keys, in float32 or not; and shares that nothing else reads.
    """

    name: ClassVar[str] = "fused-attention"
    takes: ClassVar[frozenset[str]] = frozenset({"evaluated"})
    changes_results: ClassVar[bool] = True

    def call(self, graph: Graph) -> bool:
        """Replace every attention that is written out so."""
        written_out = [a for a in find_attentions(graph.nodes) if not a.fused]
        spelled = [spelled_with_matmul(graph, attention) for attention in written_out]
        changed = any(spelled)
        for attention in [a for a in find_attentions(graph.nodes) if not a.fused]:
            written = read_written(attention)
            if isinstance(written, Written):
                changed |= _replaced(graph, attention, written)
        graph.module.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
        return changed


def read_written(attention: Attention) -> Written | str:
    """An attention that is written out; or why it is not one operation in ONNX."""
    if attention.fused:
        return "it is one operation"
    if operation(attention.scores) != "matmul" or operation(attention.mixed) != "matmul":
        return "its products are no matrix products of heads"
    parts = (attention.query, attention.key, attention.value)
    if any(part.meta["val"].dim() != 4 for part in parts):
        return "its heads share an axis with the batch"
    if attention.softmax.args[1] not in (-1, 3):
        return "its softmax is not along the keys"
    return _behind(attention) or _before(attention)


def _behind(attention: Attention) -> str | None:
    """Why the shares are not those of the softmax as it is; None if they are."""
    node = attention.softmax
    while True:
        if len(node.users) != 1:
            return "its shares are read elsewhere too"
        (user,) = node.users
        if user is attention.mixed:
            return None if user.args[0] is node else "its shares are the second operand of their product"
        if not _is_same(user):
            return f"its shares are changed by {operation(user)} behind the softmax"
        node = user


def _before(attention: Attention) -> Written | str:
    """What becomes of the scores in front of the softmax, read backwards: masks, a cap, then scales."""
    node, scale, cap = cast(fx.Node, attention.softmax.args[0]), 1.0, 0.0
    masks: list[tuple[fx.Node, bool]] = []
    while node is not attention.scores:
        if len(node.users) != 1:
            return "its scores are read elsewhere too"
        scaled = cap != 0 or scale != 1.0
        added, factor, capped = _added(node, attention), _factor(node), _capped(node)
        if _is_same(node):
            node = cast(fx.Node, node.args[0])
        elif added is not None and not scaled:
            mask, node, inside = added
            masks.append((mask, inside))
        elif capped is not None and not scaled:
            cap, node = capped
        elif factor is not None:
            scale, node = scale * factor, cast(fx.Node, node.args[0])
        else:
            where = "before they are scaled or capped, " if added is not None or capped is not None else ""
            return f"its scores are changed {where}by {operation(node)}"
    if len(node.users) != 1:
        return "its scores are read elsewhere too"
    return Written(scale, cap, masks)


def _is_same(node: fx.Node) -> bool:
    """Whether a value is another one, in a dtype of its own perhaps."""
    name = operation(node)
    idle = name == "dropout" and (node.args[1] == 0 or node.args[2] is False)
    same = name in SAME or name in CASTS or idle
    return bool(same and keeps_shape(node) and node.meta["val"].dtype.is_floating_point)


def _factor(node: fx.Node) -> float | None:
    """The number that a value is multiplied by."""
    if operation(node) not in ("mul", "div") or len(node.args) != 2 or node.kwargs:
        return None
    number = node.args[1]
    if not isinstance(number, (int, float)) or number == 0:
        return None
    return float(number) if operation(node) == "mul" else 1 / float(number)


def _capped(node: fx.Node) -> tuple[float, fx.Node] | None:
    """`c` and `x` of `c tanh(x / c)`."""
    cap, tanh = _factor(node), node.args[0] if node.args else None
    if cap is None or cap <= 0 or not isinstance(tanh, fx.Node) or operation(tanh) != "tanh":
        return None
    inner = cast(fx.Node, tanh.args[0])
    factor = _factor(inner)
    if factor is None or abs(factor * cap - 1) > 1e-12 or len(tanh.users) != 1 or len(inner.users) != 1:
        return None
    return cap, cast(fx.Node, inner.args[0])


def _added(node: fx.Node, attention: Attention) -> tuple[fx.Node, fx.Node, bool] | None:
    """What is added to the scores; the scores; and whether it is a condition that hides them where it holds."""
    name, shape = operation(node), str(node.meta["val"].shape)
    if name in ("add", "__add__") and len(node.args) == 2 and not node.kwargs:
        sides = [side for side in node.args if isinstance(side, fx.Node)]
        scores = [side for side in sides if _leads_to(side, attention.scores)]
        if len(sides) == 2 and len(scores) == 1 and str(scores[0].meta["val"].shape) == shape:
            return next(side for side in sides if side is not scores[0]), scores[0], False
    if name == "masked_fill" and len(node.args) == 3 and _hides(node.args[2]):
        scores, condition = node.args[0], node.args[1]
        if isinstance(scores, fx.Node) and isinstance(condition, fx.Node) and keeps_shape(node):
            return condition, scores, True
    return None


def _hides(value: object) -> bool:
    return isinstance(value, (int, float)) and value <= HIDES


def _leads_to(node: fx.Node, scores: fx.Node) -> bool:
    """Whether a value is the scores, changed."""
    while node is not scores:
        changes = _is_same(node) or operation(node) in ("add", "mul", "div", "tanh", "masked_fill")
        if not changes or not node.args or not isinstance(node.args[0], fx.Node):
            return False
        node = node.args[0]
    return True


def _replaced(graph: Graph, attention: Attention, written: Written) -> bool:
    """Put one operation in the place of an attention, where ONNX has it."""
    node = attention.mixed

    def call(target: Any, *args: Any) -> fx.Node:
        return graph.call(target, *args, like=node)

    with graph.module.graph.inserting_before(node):
        key, dtype = cast(fx.Node, attention.scores.args[1]), attention.query.meta["val"].dtype
        turned = operation(key) == "transpose" and {axis % 4 for axis in cast(Any, key.args[1:])} == {2, 3}
        key = cast(fx.Node, key.args[0]) if turned else call(aten.transpose.int, key, 2, 3)
        mask: fx.Node | None = None
        for part, hides in written.masks:
            added = call(aten.where.Scalar, part, float("-inf"), 0.0) if hides else part
            added = added if added.meta["val"].dtype == dtype else call(aten.to.dtype, added, dtype)
            mask = added if mask is None else call(aten.add.Tensor, mask, added)
        operands = (attention.query, key, attention.value, mask, 0.0, False, written.scale, written.softcap)
        one = call(onnx.scaled_dot_product_attention.default, *operands)
    if unlike_standard(Attention(attention.query, key, attention.value, one, one, one)) is not None:
        return False
    node.replace_all_uses_with(one)
    return True
