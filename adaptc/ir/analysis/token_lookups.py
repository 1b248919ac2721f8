"""What lookups do to the axis of the tokens, and the sorting of rows among experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from adaptc.ir.analysis.token_axes import (
    Axes,
    MixesTokensError,
    Operands,
    Rule,
    TokenAxis,
    same_axes,
    sole,
    value_of,
)
from adaptc.ir.nodes import list_arg, node_arg


def _embedding(node: fx.Node, operands: Operands, tokens: Any) -> Axes:
    weight, ids = node_arg(node, 0), node_arg(node, 1)
    if weight in operands:
        raise MixesTokensError("its table is computed from the token ids")
    return operands[ids]


def _embedding_of_bits(node: fx.Node, operands: Operands, tokens: Any) -> Axes:
    return sole(operands, node)[1]


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
    _, axes = sole(operands, node)
    if any(axis.alone for axis in axes):
        raise MixesTokensError("it counts over the tokens")
    return ()


def _grouped(node: fx.Node, operands: Operands, tokens: Any) -> Axes:
    """Each row is multiplied by the matrix of its expert; the third operand says how many rows each has."""
    rows, weight = node_arg(node, 0), node_arg(node, 1)
    if weight in operands:
        raise MixesTokensError("it is not known to keep tokens apart")
    return operands[rows]


LOOKUPS: Mapping[str, Rule] = {
    "embedding": _embedding,
    "quantized_embedding": _embedding_of_bits,
    **dict.fromkeys(("index", "_unsafe_index"), _index),
    **dict.fromkeys(("index_put", "index_put_"), _index_put),
    **dict.fromkeys(("histc", "bincount"), _counted),
    **dict.fromkeys(("_grouped_mm", "grouped_mm_fallback"), _grouped),
}
"""Name of an operation -> its rule."""
