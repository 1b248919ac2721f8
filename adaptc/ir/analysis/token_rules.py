"""What each operation does to the axis of the tokens. What has no rule might let tokens meet, and is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from adaptc.ir.analysis.attention import FUSED
from adaptc.ir.analysis.matrix_products import product_terms
from adaptc.ir.analysis.token_axes import (
    Axes,
    MixesTokensError,
    Operands,
    Rule,
    TokenAxis,
    argument,
    dims_of,
    same_axes,
    sole,
    value_of,
)
from adaptc.ir.analysis.token_lookups import LOOKUPS
from adaptc.ir.analysis.token_views import VIEWS
from adaptc.ir.nodes import is_operator, list_arg, node_arg, operation

ELEMENTWISE = frozenset(
    [
        "__and__",
        "__or__",
        "__xor__",
        "_to_copy",
        "absolute",
        "alias",
        "arctan2",
        "celu",
        "clip",
        "clone",
        "contiguous",
        "copy_",
        "detach",
        "divide",
        "dropout",
        "dropout_",
        "empty_like",
        "feature_dropout",
        "fill_",
        "fix",
        "float_power",
        "floor_divide",
        "full_like",
        "greater",
        "greater_equal",
        "hardshrink",
        "hardswish",
        "isfinite",
        "less",
        "less_equal",
        "lift_fresh_copy",
        "log_sigmoid",
        "masked_fill",
        "masked_fill_",
        "multiply",
        "negative",
        "not_equal",
        "ones_like",
        "prelu",
        "relu6",
        "rrelu",
        "rsub",
        "selu",
        "softshrink",
        "square",
        "subtract",
        "to",
        "true_divide",
        "type_as",
        "where",
        "zero_",
        "zeros_like",
    ]
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


def _product(node: fx.Node, operands: Operands, terms: list[tuple[fx.Node, str]], result: str) -> Axes:
    """A product of matrices, as the letters of an einsum tell its axes.

    Tokens are summed over only where a score of every token is multiplied with its value, and only tokens of the past
    meet those that ask.
    """
    by_letter: dict[str, TokenAxis] = {}
    for operand, letters in terms:
        for axis in operands.get(operand, ()):
            letter = letters[axis.axis]
            if by_letter.setdefault(letter, axis).past != axis.past:
                raise MixesTokensError("each token meets other tokens in it")
    for letter, axis in by_letter.items():
        if letter not in result and not axis.past:
            raise MixesTokensError("it sums over the tokens")
        if (
            letter not in result
            and len([o for o, of_operand in terms if letter in of_operand and operands.get(o)]) < 2
        ):
            raise MixesTokensError("it sums over the tokens")
    left = [letter for letter in by_letter if letter in result]
    if len([letter for letter in left if not by_letter[letter].past]) > 1:
        raise MixesTokensError("each token meets every other token in it, and it is not seen to be attention")
    return tuple(by_letter[letter].at(result.index(letter)) for letter in left)


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


def _along(node: fx.Node, operands: Operands, tokens: Any) -> Axes:
    """An operation along some axes that keeps the shape, such as softmax."""
    first, axes = sole(operands, node)
    dims = dims_of(node)
    for axis in axes:
        asked = [other for other in axes if not other.past]
        over_seen = axis.past and asked and dims == [axis.axis] and operation(node) in SOFTMAX
        routed = not axis.alone and operation(node) in SORTS and not value_of(first).is_floating_point()
        if (dims is None or axis.axis in dims) and not (over_seen or routed):
            raise MixesTokensError("it works along the tokens")
    return axes


def _reduction(node: fx.Node, operands: Operands, tokens: Any) -> Axes:
    first, axes = sole(operands, node)
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
    first, axes = sole(operands, node)
    rank, normalised = value_of(first).dim(), len(list_arg(node, 1))
    if any(axis.axis >= rank - normalised for axis in axes):
        raise MixesTokensError("it normalises over the tokens")
    return axes


def _one_hot(node: fx.Node, operands: Operands, tokens: Any) -> Axes:
    """Each entry becomes a row, along a new last axis."""
    return sole(operands, node)[1]


def _batch_norm(node: fx.Node, operands: Operands, tokens: Any) -> Axes:
    """In evaluation mode a scale and a shift for each channel."""
    return sole(operands, node)[1]


def _convolution(node: fx.Node, operands: Operands, tokens: Any) -> Axes:
    """A convolution whose kernel is 1 wide along the tokens is a matrix product for each."""
    _, axes = sole(operands, node)
    weight = value_of(node_arg(node, 1)).shape
    stride, padding, spatial = argument(node, "stride"), argument(node, "padding"), len(weight) - 2
    plain = stride in (1, [1] * spatial, [1]) and padding in (0, [0] * spatial, [0], "valid")
    for axis in axes:
        if axis.axis == 1:
            raise MixesTokensError("it sums over the tokens")
        if axis.axis >= 2 and not (weight[axis.axis] == 1 and plain):
            raise MixesTokensError("it is a convolution along the tokens")
    return axes


SOFTMAX = frozenset({"softmax", "_softmax"})
SORTS = frozenset({"sort", "argsort"})
ALONG = (
    *("softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum", "cumprod", "cummax", "logcumsumexp"),
    *("sort", "argsort", "topk", "flip", "roll", "glu", "renorm"),
)
REDUCTIONS = (
    *("mean", "sum", "var", "std", "amax", "amin", "max", "min", "prod", "any", "all", "argmax", "argmin"),
    *("logsumexp", "norm", "linalg_vector_norm", "count_nonzero"),
)
RULES: Mapping[str, Rule] = {
    **VIEWS,
    **LOOKUPS,
    FUSED: _attention,
    "one_hot": _one_hot,
    **dict.fromkeys(ALONG, _along),
    **dict.fromkeys(REDUCTIONS, _reduction),
    **dict.fromkeys(("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm"), _norm),
    **dict.fromkeys(("batch_norm", "_native_batch_norm_legit_no_training"), _batch_norm),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
}
"""Name of an operation -> its rule. Operations on single entries and products of matrices have one rule each."""
