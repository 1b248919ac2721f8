"""Choosing row by row between values of different adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from adaptc.ir.analysis.dataflow import ancestors
from adaptc.ir.analysis.token_axes import shape_of
from adaptc.ir.nodes import is_tensor
from adaptc.rewriter.rows.batched import UnbatchedError
from adaptc.rewriter.rows.builder import Builder
from adaptc.rewriter.rows.gather import Gather, NotAlikeError, structure
from adaptc.rewriter.rows.row_axis import RowAxis, Rows

aten = torch.ops.aten


class Chooser:
    """Chooses between the values that the graphs of several adapters have, by the adapter of each row.

    Args:
        build: puts operations into the graph.
        rows: where rows are in a value.
        ids: the input `(rows,)`: the place of an adapter, or -1 for the base.
        count: how many graphs there are, the base's first.
    """

    def __init__(self, build: Builder, rows: Rows, ids: fx.Node, count: int):
        self.build, self.rows, self.ids, self.count = build, rows, ids, count
        self._gather = Gather(build, rows, ids)

    def kind(self, value: fx.Node) -> Any:
        """What two values must have in common so that one of them can be chosen for each row."""
        axis = self.rows.axis(value) if is_tensor(value) else None
        if axis is None:
            return value
        tensor = value.meta["val"]
        return str(list(tensor.shape)), tensor.dtype, axis

    def among(self, values: Mapping[int, fx.Node]) -> fx.Node:
        """One value with the rows of several, of the same kind.

        Args:
            values: number of a graph -> its value. Rows of other graphs get any.
        """
        gathered = dict(values)
        for members in self._alike(values):
            together = self._gathered({k: values[k] for k in members})
            if together is None:  # the base has no such computation; the others among themselves have
                members = [k for k in members if values[k] is not next(iter(values.values()))]
                together = self._gathered_alike({k: values[k] for k in members}) if len(members) > 1 else None
            if together is not None:
                gathered |= dict.fromkeys(members, together)
        return self._chosen(gathered)

    def _alike(self, values: Mapping[int, fx.Node]) -> list[list[int]]:
        """The graphs whose values are computed by the same operations, together; the first graph is with the others.

        Returns:
            Numbers of graphs, each once but for the first, which is in every group.
        """
        (first, base), *others = values.items()
        shared = ancestors(base) | {base}
        groups: dict[Any, list[int]] = {}
        for k, value in others:
            if value is base:
                continue
            groups.setdefault(structure(value, shared), []).append(k)
        same = [first, *(k for k, value in others if value is base)]
        return [[*same, *members] for members in groups.values()] or [same]

    def _gathered(self, values: Mapping[int, fx.Node]) -> fx.Node | None:
        """One value with the rows of several, each of which gathers its own; None where they are not alike."""
        first = next(iter(values.values()))
        try:
            return self._gather.value(tuple(values.get(k, first) for k in range(self.count)))
        except (NotAlikeError, UnbatchedError):
            return None

    def _gathered_alike(self, values: Mapping[int, fx.Node]) -> fx.Node | None:
        """As `_gathered`, where none of the values is the base's."""
        first = next(iter(values.values()))
        try:
            return self._gather.alike(tuple(values.get(k, first) for k in range(self.count)))
        except (NotAlikeError, UnbatchedError):
            return None

    def _chosen(self, values: Mapping[int, fx.Node]) -> fx.Node:
        """One value with the rows of several, each computed for all rows."""
        by_node: dict[fx.Node, list[int]] = {}
        for k, value in values.items():
            by_node.setdefault(value, []).append(k)
        (chosen, _), *others = by_node.items()
        for value, members in others:
            axis = self.rows.axis(value)
            assert axis is not None
            chosen = self._where(self.mask(members, axis, value), value, chosen)
        return chosen

    def _where(self, mask: fx.Node, value: fx.Node, otherwise: fx.Node) -> fx.Node:
        return self.build.call(aten.where.self, mask, value, otherwise, like=value)

    def mask(self, members: Sequence[int], axis: RowAxis, like: fx.Node) -> fx.Node:
        """Which rows have one of some adapters, in a shape that broadcasts against a value.

        Args:
            members: the numbers of the graphs.
            axis: where the rows are in the value.
            like: the value.
        """
        mask = self._call(aten.eq.Scalar, self.ids, members[0] - 1, like=like)
        for k in members[1:]:
            another = self._call(aten.eq.Scalar, self.ids, k - 1, like=like)
            mask = self._call(aten.logical_or.default, mask, another, like=like)
        return self.spread(mask, axis, like)

    def spread(self, by_row: fx.Node, axis: RowAxis, like: fx.Node) -> fx.Node:
        """A value for each row `(rows,)` in a shape that broadcasts against another value."""
        shape = shape_of(like)
        if not axis.alone:
            before, after = (self._size(n, like) for n in (axis.before, axis.after))
            whole = self._call(aten.view.default, by_row, [1, -1, 1], like=like)
            whole = self._call(aten.expand.default, whole, [before, -1, after], like=like)
            by_row = self._call(aten.reshape.default, whole, [-1], like=like)
        return self._call(
            aten.view.default, by_row, [*[1] * axis.axis, -1, *[1] * (len(shape) - axis.axis - 1)], like=like
        )

    def _size(self, number: Any, like: fx.Node) -> Any:
        """A number of entries as an argument: what a size of a value is divided by the rows gives it."""
        if number.is_Integer:
            return int(number)
        shape = shape_of(like)
        axis = next(axis for axis, size in enumerate(shape) if self.rows.size in size.free_symbols)
        size = self._call(aten.sym_size.int, like, axis, like=like)
        count = self._call(aten.sym_size.int, self.ids, 0, like=like)
        return self._call(_floordiv(), size, count, like=like)

    def padded(self, values: Sequence[fx.Node]) -> fx.Node | None:
        """One value with the rows of several, whose other axes may differ in size: zeros are put behind.

        Returns:
            It; None where the values have no rows, or differ in more than sizes that are fixed.
        """
        axes = {self.rows.axis(value) for value in values}
        tensors = [value.meta["val"] for value in values]
        if None in axes or len(axes) != 1 or len({(t.dim(), t.dtype) for t in tensors}) != 1:
            return None
        shapes = [[*value.shape] for value in tensors]
        widest: list[Any] = []
        for sizes in zip(*shapes, strict=True):
            if len(set(map(str, sizes))) > 1 and not all(isinstance(size, int) for size in sizes):
                return None
            widest.append(max(sizes) if all(isinstance(size, int) for size in sizes) else sizes[0])
        return self.among({k: self._wide(value, widest) for k, value in enumerate(values)})

    def _wide(self, value: fx.Node, widest: Sequence[Any]) -> fx.Node:
        """A value with zeros behind, so that its fixed sizes are these."""
        missing: list[int] = []
        for size, wide in reversed(list(zip(value.meta["val"].shape, widest, strict=True))):
            missing += [0, wide - size if isinstance(size, int) else 0]
        if not any(missing):
            return value
        return self._call(aten.constant_pad_nd.default, value, missing, 0, like=value)

    def _call(self, target: Any, *args: Any, like: fx.Node) -> fx.Node:
        return self.build.call(target, *args, like=like)


def _floordiv() -> Any:
    import operator

    untyped: Any = operator
    return untyped.floordiv
