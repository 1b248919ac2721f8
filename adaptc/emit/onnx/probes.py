"""What masks and rotary tables of a decoder with a cache are, read from their values on small inputs."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import fx

from adaptc.ir.analysis.dataflow import walk
from adaptc.ir.example_inputs import example_sizes, example_tensors
from adaptc.ir.graph import Graph
from adaptc.ir.nodes import size_expression
from adaptc.ir.values import Values
from adaptc.rewriter.cache.inputs import new_tokens
from adaptc.rewriter.cache.past import PAST, TOTAL

HIDDEN = -1e4
"""A bias that is no greater hides a key: its share is exactly 0 in float32."""
LONGEST_WINDOW = 2**17
"""The longest sliding window that is looked for."""
LONGEST_SQUARE = 2**12
"""The longest text whose mask is computed for all pairs of tokens."""


class Probes:
    """Values of a graph with a cache, on texts of some length of which some tokens are in the past.

    Args:
        graph: it only evaluates, and has a cache.
    """

    def __init__(self, graph: Graph):
        self.graph, self.new = graph, new_tokens(graph)
        self.values = cache(self._values)

    def _values(self, past: int, new: int, lengths: tuple[int, ...] = ()) -> Values:
        """The values on `past + new` tokens; of rows padded on the right to that, where `lengths` are given."""
        specs = self.graph.inputs
        batch = next(spec.dims[0] for spec in specs if PAST in spec.dims)
        rows, total = len(lengths) or 1, past + new
        sizes = example_sizes(specs) | {str(batch): rows, self.new: new, PAST: past, TOTAL: total}
        tensors = example_tensors(specs, sizes)
        for spec in specs:
            if spec.dims == (batch, TOTAL):
                ends = torch.tensor(lengths or (total,))[:, None]
                seen = torch.arange(total)[None] < ends
                tensors[spec.name] = seen.to(getattr(torch, spec.dtype))
            elif spec.name == "position_ids":
                tensors[spec.name] = torch.arange(past, total).expand(rows, new)
        return Values(self.graph, tensors)

    def window(self, mask: fx.Node) -> int | None:
        """How many tokens back a mask lets each token see, itself among them; 0 where it sees all of the past.

        None where the mask says anything else, beside hiding tokens that rows are padded with on the right.
        """
        totals = self._totals(mask)
        if totals is None:
            return None
        try:
            counts = {total: _last_seen(self.values(total - 1, 1).of(mask)) for total in totals}
            if None in counts.values():
                return None
            least = {total: int(count or 0) for total, count in counts.items()}
            window = 0 if all(total == count for total, count in least.items()) else max(least.values())
            if any(count != (min(total, window) if window else total) for total, count in least.items()):
                return None
            shapes: tuple[tuple[int, int, tuple[int, ...]], ...] = ((0, 7, ()), (3, 4, ()), (0, 7, (7, 3)))
            return window if all(self._sees(mask, window, *shape) for shape in shapes) else None
        except RuntimeError:  # a mask that is stored for shorter texts
            return None

    def _sees(self, mask: fx.Node, window: int, past: int, new: int, lengths: tuple[int, ...]) -> bool:
        """Whether a mask lets tokens see so many back, and no padding."""
        seen = visible(self.values(past, new, lengths).of(mask))
        total = past + new
        keys, queries = torch.arange(total)[None], torch.arange(past, total)[:, None]
        expected = (keys <= queries) & (keys > queries - (window or total))
        if seen is None:
            return False
        rows = seen.expand(len(lengths) or 1, *seen.shape[-3:]) if seen.dim() == 4 else seen[None]
        return all(
            bool((row[..., : end - past, :] == expected[: end - past]).all())
            for row, end in zip(rows, lengths or (total,), strict=len(rows) > 1)
        )

    def _totals(self, mask: fx.Node) -> list[int] | None:
        """Lengths of texts at which a mask can change: those that its operations name; None where they are too long."""
        cone = list(walk([mask], lambda node: node.all_input_nodes))
        named = {int(c) for node in cone for c in _numbers(node) if 1 < c <= LONGEST_WINDOW}
        if any(_is_square(node) for node in cone) and max(named, default=0) > LONGEST_SQUARE:
            return None
        return sorted({7, 8} | {count + more for count in named for more in (0, 1, 2)})

    def table(self, part: fx.Node, longest: int) -> torch.Tensor | None:
        """The cosines or sines that rotate the tokens of a text, `(longest, size / 2)`.

        None where the two halves of a row differ, or a token's row depends on more than its position.
        """
        whole = self.values(0, longest).of(part)
        if whole.shape[:-2].numel() != 1 or whole.shape[-2] != longest:
            return None
        whole = whole.reshape(longest, -1)
        first, second = whole.chunk(2, -1)
        for past, new in ((0, 3), (3, 4), (7, 1)):
            rows = self.values(past, new).of(part)
            if past + new > longest or not torch.equal(rows.reshape(new, -1), whole[past : past + new]):
                return None
        return first.contiguous() if torch.equal(first, second) else None


def visible(mask: Any) -> torch.Tensor | None:
    """Where a mask lets a query see a key; None where it weighs what is seen."""
    if mask.dtype == torch.bool:
        return mask
    seen = mask == 0
    return seen if bool((seen | (mask <= HIDDEN)).all()) else None


def _last_seen(mask: Any) -> int | None:
    """How many of the last keys the one query of a mask sees; None where it sees others."""
    seen = visible(mask)
    if seen is None:
        return None
    rows = seen.flatten(0, -2)
    count = int(rows[0].sum())
    expected = torch.arange(rows.shape[-1]) >= rows.shape[-1] - count
    return count if count and bool((rows == expected).all()) else None


def _numbers(node: fx.Node) -> list[int]:
    """The whole numbers among the arguments of an operation."""
    return [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, int) and not isinstance(a, bool)]


def _is_square(node: fx.Node) -> bool:
    """Whether two axes of a value are along all tokens."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return False
    sizes = [size_expression(size) for size in value.shape]
    dynamic = [size for size in sizes if not size.is_number]
    return len(dynamic) > len(set(dynamic))
