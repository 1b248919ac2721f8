"""What each operation does to the axis of the tokens. What has no rule might let tokens meet, and is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import fx

from adaptc.ir.analysis.attention import FUSED
from adaptc.ir.analysis.matrix_products import product_terms
from adaptc.ir.analysis.token_axes import Axes, MixesTokensError, TokenAxis, shape_of, value_of, viewed
from adaptc.ir.nodes import is_operator, list_arg, node_arg, operation

Operands = Mapping[fx.Node, Axes]
"""The axes of the operands that are computed from the ids."""
Rule = Callable[[fx.Node, Operands, Any], Axes]
"""Called with a node, the axes of its operands and the number of tokens: gives the axes of its result."""

ELEMENTWISE = frozenset(
    {
        *(
            "where",
            "masked_fill",
            "masked_fill_",
            "dropout",
            "to",
            "_to_copy",
            "clone",
            "contiguous",
            "alias",
        ),
        *("detach", "type_as", "lift_fresh_copy", "full_like", "zeros_like", "ones_like", "empty_like"),
        *("__and__", "__or__", "__xor__", "copy_", "fill_", "zero_", "prelu", "dropout_", "feature_dropout"),
        *(
            "floor_divide",
            "true_divide",
            "divide",
            "multiply",
            "subtract",
            "square",
            "absolute",
            "negative",
            "clip",
        ),
        *(
            "relu6",
            "selu",
            "log_sigmoid",
            "rsub",
            "not_equal",
            "greater",
            "greater_equal",
            "less",
            "less_equal",
        ),
        *(
            "fix",
            "arctan2",
            "float_power",
            "one_hot",
            "softshrink",
            "hardshrink",
            "celu",
            "rrelu",
            "isfinite",
            "hardswish",
        ),
    }
)
"""Operations on single entries that torch does not tag as such."""
SIZES_ALONE = frozenset({"new_ones", "new_zeros", "new_full", "new_empty"})
"""Operations that take a dtype and a device from their operand, and none of its entries."""


def axes_after(node: fx.Node, operands: Operands, tokens: Any) -> Axes:
    """The axes of a node's result.

    Args:
        node: an operation.
        operands: the axes of those of its operands that are computed from the ids.
        tokens: the number of tokens.

    Raises:
        MixesTokensError: it lets tokens meet, or might.
    """
    name = operation(node)
    if is_elementwise(node):
        return _elementwise(node, operands)
    terms = product_terms(node)
    if terms is not None:
        return _product(node, operands, *terms)
    rule = RULES.get(name)
    if rule is None:
        raise MixesTokensError("it is not known to keep tokens apart")
    return rule(node, operands, tokens)


def is_elementwise(node: fx.Node) -> bool:
    """Whether an operation works on single entries, operands broadcast."""
    tagged = is_operator(node.target) and torch.Tag.pointwise in node.target.tags
    return tagged or operation(node) in ELEMENTWISE


def _elementwise(node: fx.Node, operands: Operands) -> Axes:
    rank = value_of(node).dim()
    shifted = {
        operand: tuple(axis.at(axis.axis + rank - value_of(operand).dim()) for axis in axes)
        for operand, axes in operands.items()
    }
    return same_axes(shifted.values())


def same_axes(several: Any) -> Axes:
    """The axes that several values share.

    Raises:
        MixesTokensError: they differ.
    """
    first, *others = several
    if any(set(first) != set(other) for other in others):
        raise MixesTokensError("each token meets other tokens in it")
    return first


def _product(node: fx.Node, operands: Operands, terms: list[tuple[fx.Node, str]], result: str) -> Axes:
    """A product of matrices, as the letters of an einsum tell its axes.

    Tokens are summed over only where a score of every token is multiplied with its value, and only tokens of the past
    meet those that ask.
    """
    found: dict[str, TokenAxis] = {}
    for operand, letters in terms:
        for axis in operands.get(operand, ()):
            letter = letters[axis.axis]
            if found.setdefault(letter, axis).past != axis.past:
                raise MixesTokensError("each token meets other tokens in it")
    for letter, axis in found.items():
        if letter not in result and not axis.past:
            raise MixesTokensError("it sums over the tokens")
        if letter not in result and len([o for o, own in terms if letter in own and operands.get(o)]) < 2:
            raise MixesTokensError("it sums over the tokens")
    left = [letter for letter in found if letter in result]
    if len([letter for letter in left if not found[letter].past]) > 1:
        raise MixesTokensError("each token meets every other token in it, and it is not seen to be attention")
    return tuple(found[letter].at(result.index(letter)) for letter in left)


def _attention(node: fx.Node, operands: Operands, tokens: Any) -> Axes:
    query, key, value = (node_arg(node, position) for position in range(3))
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    if mask in operands:
        raise MixesTokensError("its mask is computed from the token ids")
    asked = operands.get(query, ())
    for other in (key, value):
        for axis in operands.get(other, ()):
            if not axis.past or axis.axis != value_of(other).dim() - 2 or not axis.alone:
                raise MixesTokensError("its keys and values are not along the tokens")
    if any(axis.axis != value_of(query).dim() - 2 or not axis.alone for axis in asked):
        raise MixesTokensError("its queries are not along the tokens")
    return asked


def _only(operands: Operands, node: fx.Node) -> tuple[fx.Node, Axes]:
    """The first operand, and its axes; it must be the only one with tokens."""
    first = node_arg(node, 0)
    if list(operands) != [first]:
        raise MixesTokensError("it is not known to keep tokens apart")
    return first, operands[first]


def _view(node: fx.Node, operands: Operands, tokens: Any) -> Axes:
    first, axes = _only(operands, node)
    return viewed(axes, shape_of(first), shape_of(node), tokens)


def _renumbered(order: Callable[[fx.Node, int], list[int]]) -> Rule:
    """The rule of a permutation: `order` gives, for each axis of the result, that of the operand."""

    def rule(node: fx.Node, operands: Operands, tokens: Any) -> Axes:
        first, axes = _only(operands, node)
        moved = order(node, value_of(first).dim())
        return tuple(axis.at(moved.index(axis.axis)) for axis in axes)

    return rule


def _transpose(node: fx.Node, rank: int) -> list[int]:
    order = list(range(rank))
    first, second = (cast(int, position) % rank for position in node.args[1:3])
    order[first], order[second] = order[second], order[first]
    return order


def _permute(node: fx.Node, rank: int) -> list[int]:
    return [int(axis) % rank for axis in list_arg(node, 1)]


def _expand(node: fx.Node, operands: Operands, tokens: Any) -> Axes:
    first, axes = _only(operands, node)
    return tuple(axis.at(axis.axis + value_of(node).dim() - value_of(first).dim()) for axis in axes)


def _unsqueeze(node: fx.Node, operands: Operands, tokens: Any) -> Axes:
    _, axes = _only(operands, node)
    at = cast(int, node.args[1]) % value_of(node).dim()
    return tuple(axis.at(axis.axis + (at <= axis.axis)) for axis in axes)


def _embedding(node: fx.Node, operands: Operands, tokens: Any) -> Axes:
    weight, ids = node_arg(node, 0), node_arg(node, 1)
    if weight in operands:
        raise MixesTokensError("its table is computed from the token ids")
    return operands[ids]


def _embedding_of_bits(node: fx.Node, operands: Operands, tokens: Any) -> Axes:
    return _only(operands, node)[1]


def dims_of(node: fx.Node) -> list[int] | None:
    """The axes that an operation names by its argument `dim`; None if it names none, and works on all."""
    named = _argument(node, "dim")
    if named is None or named == []:
        return None
    rank = value_of(node_arg(node, 0)).dim()
    listed = cast(list[int], named if isinstance(named, (list, tuple)) else [named])
    return [int(axis) % rank for axis in listed]


def _argument(node: fx.Node, *names: str) -> Any:
    """An argument of a node by its name in torch's schema, or its default."""
    schema: Any = node.target._schema if is_operator(node.target) else None  # pyright: ignore[reportPrivateUsage]
    for position, argument in enumerate(schema.arguments if schema is not None else ()):
        if argument.name in names:
            if position < len(node.args):
                return node.args[position]
            return node.kwargs.get(argument.name, argument.default_value)
    return None


def _along(node: fx.Node, operands: Operands, tokens: Any) -> Axes:
    """An operation along some axes that keeps the shape, such as softmax."""
    first, axes = _only(operands, node)
    dims = dims_of(node)
    for axis in axes:
        asked = [other for other in axes if not other.past]
        over_seen = axis.past and asked and dims == [axis.axis] and operation(node) in SOFTMAX
        routed = not axis.alone and operation(node) in SORTS and not value_of(first).is_floating_point()
        if (dims is None or axis.axis in dims) and not (over_seen or routed):
            raise MixesTokensError("it works along the tokens")
    return axes


def _reduction(node: fx.Node, operands: Operands, tokens: Any) -> Axes:
    first, axes = _only(operands, node)
    dims = dims_of(node)
    if dims is None or any(axis.axis in dims for axis in axes):
        if axes:
            raise MixesTokensError("it computes one value from all tokens")
        return axes
    if value_of(node).dim() == value_of(first).dim():
        return axes
    return tuple(axis.at(axis.axis - sum(dim < axis.axis for dim in dims)) for axis in axes)


def _norm(node: fx.Node, operands: Operands, tokens: Any) -> Axes:
    """`layer_norm(x, normalized_shape, …)`: over the last axes."""
    first, axes = _only(operands, node)
    rank, normalised = value_of(first).dim(), len(list_arg(node, 1))
    if any(axis.axis >= rank - normalised for axis in axes):
        raise MixesTokensError("it normalises over the tokens")
    return axes


def _slice(node: fx.Node, operands: Operands, tokens: Any) -> Axes:
    """`x[start:end]` along an axis: all of the tokens, or the last ones."""
    first, axes = _only(operands, node)
    along = cast(int, _argument(node, "dim")) % value_of(first).dim()
    kept = tuple(axis for axis in axes if axis.axis != along)
    if len(kept) == len(axes) or shape_of(first) == shape_of(node):
        return axes
    start, end = _argument(node, "start"), _argument(node, "end")
    if start == -1 and (end is None or (isinstance(end, int) and end > 2**31)) and all(a.alone for a in axes):
        return kept
    raise MixesTokensError("it takes some of the tokens, by their place")


def _select(node: fx.Node, operands: Operands, tokens: Any) -> Axes:
    first, axes = _only(operands, node)
    along = cast(int, node.args[1]) % value_of(first).dim()
    kept = tuple(axis for axis in axes if axis.axis != along)
    if len(kept) < len(axes) and (node.args[2] != -1 or not all(axis.alone for axis in axes)):
        raise MixesTokensError("it takes one of the tokens, by its place")
    return tuple(axis.at(axis.axis - (axis.axis > along)) for axis in kept)


def _pieces(node: fx.Node, operands: Operands, tokens: Any) -> Axes:
    """`split` and the like: a list of parts along an axis."""
    first, axes = _only(operands, node)
    along = cast(int, _argument(node, "dim")) % value_of(first).dim()
    if any(axis.axis == along for axis in axes):
        raise MixesTokensError("it splits the tokens")
    if operation(node) == "unbind":
        return tuple(axis.at(axis.axis - (axis.axis > along)) for axis in axes)
    return axes


def _item(node: fx.Node, operands: Operands, tokens: Any) -> Axes:
    return _only(operands, node)[1]


def _joined(node: fx.Node, operands: Operands, tokens: Any) -> Axes:
    """`cat` and `stack` along another axis than the tokens; a prefix may stand in front of keys and values."""
    axes = same_axes(operands.values())
    rank = value_of(node).dim()
    along = cast(int, _argument(node, "dim")) % rank
    if operation(node) == "stack":
        return tuple(axis.at(axis.axis + (axis.axis >= along)) for axis in axes)
    if any(axis.axis == along and not (axis.past and axis.alone) for axis in axes):
        raise MixesTokensError("it puts other values beside the tokens")
    return tuple(replace(a, front=shape_of(node)[along] - tokens) if a.axis == along else a for a in axes)


def _repeat_interleave(node: fx.Node, operands: Operands, tokens: Any) -> Axes:
    _, axes = _only(operands, node)
    along = _argument(node, "dim")
    if along is None or any(axis.axis == along % value_of(node).dim() for axis in axes):
        raise MixesTokensError("it repeats tokens")
    return axes


def _batch_norm(node: fx.Node, operands: Operands, tokens: Any) -> Axes:
    """In evaluation mode a scale and a shift for each channel."""
    return _only(operands, node)[1]


def _convolution(node: fx.Node, operands: Operands, tokens: Any) -> Axes:
    """A convolution whose kernel is 1 wide along the tokens is a matrix product for each."""
    first, axes = _only(operands, node)
    weight = value_of(node_arg(node, 1)).shape
    stride, padding = (_argument(node, name) for name in ("stride", "padding"))
    ones = all(value in (1, [1] * len(value) if isinstance(value, list) else 1) for value in [stride])
    for axis in axes:
        if axis.axis < 2 and axis.axis == 1:
            raise MixesTokensError("it sums over the tokens")
        plain = ones and padding in (0, [0] * (len(weight) - 2), "valid")
        if axis.axis >= 2 and not (weight[axis.axis] == 1 and plain):
            raise MixesTokensError("it is a convolution along the tokens")
    return axes


def _index(node: fx.Node, operands: Operands, tokens: Any) -> Axes:
    """`x[i, j, …]`: entries looked up for each token, or rows that are sorted by the expert they go to."""
    source, indices = node_arg(node, 0), list_arg(node, 1)
    looked_up = [position for position, index in enumerate(indices) if index is not None]
    rank = max(value_of(indices[position]).dim() for position in looked_up)
    contiguous = looked_up == list(range(looked_up[0], looked_up[-1] + 1))
    first = looked_up[0] if contiguous else 0
    by_index = [
        tuple(axis.at(axis.axis + first + rank - value_of(indices[p]).dim()) for axis in operands[indices[p]])
        for p in looked_up
        if indices[p] in operands
    ]
    rest: list[TokenAxis] = []
    for axis in operands.get(source, ()):
        if axis.axis not in looked_up:
            before = sum(p < axis.axis for p in looked_up)
            rest.append(axis.at(axis.axis - before + (rank if axis.axis > first or not contiguous else 0)))
        elif axis.alone or not by_index:
            raise MixesTokensError("it takes some of the tokens, by their place")
    if not by_index:
        return tuple(rest)
    if rest:
        raise MixesTokensError("each token meets other tokens in it")
    return same_axes(by_index)


def _index_put(node: fx.Node, operands: Operands, tokens: Any) -> Axes:
    """`x[i] = y` with the rows of a permutation, which undoes a sort."""
    source, indices = node_arg(node, 0), list_arg(node, 1)
    several = [operands[index] for index in indices if index in operands]
    if len(indices) != 1 or source not in operands or any(a.alone for axes in several for a in axes):
        raise MixesTokensError("it is not known to keep tokens apart")
    return same_axes([operands[source], *several])


def _counted(node: fx.Node, operands: Operands, tokens: Any) -> Axes:
    """How many rows go to each expert."""
    _, axes = _only(operands, node)
    if any(axis.alone for axis in axes):
        raise MixesTokensError("it counts over the tokens")
    return ()


def _grouped(node: fx.Node, operands: Operands, tokens: Any) -> Axes:
    """Each row is multiplied by the matrix of its expert; the third operand says how many rows each has."""
    rows, weight = node_arg(node, 0), node_arg(node, 1)
    if weight in operands:
        raise MixesTokensError("it is not known to keep tokens apart")
    return operands[rows]


SOFTMAX = frozenset({"softmax", "_softmax"})
SORTS = frozenset({"sort", "argsort"})
RULES: Mapping[str, Rule] = {
    FUSED: _attention,
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze"), _view),
    "transpose": _renumbered(_transpose),
    "t": _renumbered(lambda node, rank: list(range(rank))[::-1]),
    "mT": _renumbered(lambda node, rank: [*range(rank - 2), rank - 1, rank - 2]),
    "permute": _renumbered(_permute),
    "unsqueeze": _unsqueeze,
    "expand": _expand,
    "embedding": _embedding,
    "quantized_embedding": _embedding_of_bits,
    **dict.fromkeys((*SOFTMAX, "log_softmax", "_log_softmax"), _along),
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "logcumsumexp", "sort", "argsort", "topk"), _along),
    **dict.fromkeys(("flip", "roll", "glu", "renorm"), _along),
    **dict.fromkeys(
        ("mean", "sum", "var", "std", "amax", "amin", "max", "min", "prod", "any", "all"), _reduction
    ),
    **dict.fromkeys(
        ("argmax", "argmin", "logsumexp", "norm", "linalg_vector_norm", "count_nonzero"), _reduction
    ),
    **dict.fromkeys(("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm"), _norm),
    "slice": _slice,
    "select": _select,
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "unbind"), _pieces),
    "getitem": _item,
    **dict.fromkeys(("cat", "stack", "concat"), _joined),
    **dict.fromkeys(("index", "_unsafe_index"), _index),
    **dict.fromkeys(("index_put", "index_put_"), _index_put),
    **dict.fromkeys(("histc", "bincount"), _counted),
    **dict.fromkeys(("_grouped_mm", "grouped_mm_fallback"), _grouped),
    "repeat_interleave": _repeat_interleave,
    **dict.fromkeys(("batch_norm", "_native_batch_norm_legit_no_training"), _batch_norm),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
}
"""Name of an operation -> its rule. Operations on single entries and products of matrices have one rule each."""


def with_past(axes: Axes) -> Axes:
    """The same tokens with those of the past in front."""
    return tuple(replace(axis, past=True) for axis in axes)
