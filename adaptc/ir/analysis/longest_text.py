"""How many tokens a decoder's tables have places for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

from torch import fx

from adaptc.ir.analysis.token_map import content_of
from adaptc.ir.nodes import operation, size_expression

FROM_ONE = "cumsum"
"""The operation that counts from 1; `arange` counts from 0."""
CHAIN = 32
"""The most operations between a table and what counts: a longer chain is followed no further."""


@dataclass(frozen=True)
class LongestText:
    """The longest text that a model can read.

    Attributes:
        tokens: how many tokens.
        table: the weight or buffer that has no place for more.
    """

    tokens: int
    table: str


def longest_text(nodes: Iterable[fx.Node], ids: fx.Node) -> LongestText | None:
    """The longest text that a decoder's tables of positions have places for; None where it has none.

    A table is a weight or buffer whose rows are looked up by positions, or of which the first are taken, one for each
    token. Tables that are looked up by token ids are none.

    Args:
        nodes: of a graph without a cache.
        ids: its input of token ids.
    """
    tokens = size_expression(ids.meta["val"].shape[1])
    content = content_of(ids)
    limits = [limit for node in nodes if (limit := _limit(node, tokens, content)) is not None]
    return min(limits, key=lambda limit: limit.tokens, default=None)


def _limit(node: fx.Node, tokens: Any, content: set[fx.Node]) -> LongestText | None:
    """The limit that a lookup or a slice of a table sets."""
    name = operation(node)
    table = node.args[0] if node.args else None
    if not isinstance(table, fx.Node) or table.op != "get_attr":
        return None
    sizes = table.meta["val"].shape
    index = _index(node)
    if index is not None:
        along = [size_expression(size) == tokens for size in index.meta["val"].shape]
        places = (
            _first_place(index) if along[-1:] == [True] and sum(along) == 1 and index not in content else None
        )
        return None if places is None else LongestText(int(sizes[0]) - places, str(table.target))
    if name == "slice" and len(node.args) > 3:
        axis, start = cast(int, node.args[1]), node.args[2]
        cut = node.meta["val"].shape[axis]
        if start in (0, None) and size_expression(cut) == tokens and isinstance(sizes[axis], int):
            return LongestText(sizes[axis], str(table.target))
    return None


def _index(node: fx.Node) -> fx.Node | None:
    """The rows that a lookup of a table takes; None of any other operation."""
    if operation(node) == "embedding":
        return cast(fx.Node, node.args[1])
    parts: Any = node.args[1] if operation(node) == "index" else ()
    return parts[0] if len(parts) == 1 and isinstance(parts[0], fx.Node) else None


def _first_place(index: fx.Node) -> int | None:
    """The row of the first token, where rows are counted by `arange`, `cumsum`, or an input of positions; else None."""
    node, first = index, 0
    for _ in range(CHAIN):
        name = operation(node)
        if node.op == "placeholder":
            return first if "position" in str(node.target) else None
        if name == "arange":
            return first
        if name == FROM_ONE:
            return first + 1
        if name in ("add", "sub") and len(node.args) > 1 and isinstance(node.args[1], int):
            first += node.args[1] if name == "add" else -node.args[1]
        upstream = [part for part in node.args if isinstance(part, fx.Node)]
        if not upstream:
            return None
        node = upstream[0]
    return None
