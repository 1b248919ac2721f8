"""Rotary positions of queries and keys, as graphs spell them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import fx

from adaptc.ir.nodes import arguments_by_name, is_tensor, operation


@dataclass(frozen=True)
class Rotated:
    """`x cos + half(x) sin`, where `half` of `(a, b)` is `(-b, a)`.

    Attributes:
        x: what is rotated, `(batch, heads, tokens, size)`.
        cos, sin: by how much.
    """

    x: fx.Node
    cos: fx.Node
    sin: fx.Node


def rotated(node: fx.Node) -> Rotated | None:
    """Read a rotation; None if a value is something else."""
    if operation(node) != "add" or len(node.args) != 2 or node.kwargs:
        return None
    left, right = cast(tuple[Any, Any], node.args)
    for plain, turned in ((left, right), (right, left)):
        if not all(is_tensor(term) and operation(term) == "mul" for term in (plain, turned)):
            return None
        for half, sin in (turned.args, turned.args[::-1]):
            x = _turned(half)
            if x is not None and x in plain.args:
                cos = next((other for other in plain.args if other is not x), None)
                if is_tensor(cos) and is_tensor(sin):
                    return Rotated(x, cast(fx.Node, cos), sin)
    return None


def _turned(node: Any) -> fx.Node | None:
    """The `x` of `cat(-x[size / 2:], x[:size / 2])`."""
    if not is_tensor(node) or operation(node) != "cat":
        return None
    options = arguments_by_name(node)
    parts, rank = options["tensors"], node.meta["val"].dim()
    if options["dim"] % rank != rank - 1 or len(parts) != 2 or operation(parts[0]) != "neg":
        return None
    high, low = parts[0].args[0], parts[1]
    if any(operation(part) != "slice" for part in (high, low)):
        return None
    upper, lower = arguments_by_name(high), arguments_by_name(low)
    x = upper["self"]
    size = x.meta["val"].shape[-1]
    cuts = [(part["dim"] % rank, part["start"] or 0, part["end"]) for part in (upper, lower)]
    ends = cuts[0][2] is None or cuts[0][2] >= size
    same = lower["self"] is x and ends and cuts[0][:2] == (rank - 1, size // 2)
    return x if same and cuts[1] == (rank - 1, 0, size // 2) and size % 2 == 0 else None
