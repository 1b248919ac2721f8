"""Virtual tokens among real ones: inputs made longer, tokens put in, outputs put right."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from adaptc.ir.analysis.dataflow import ancestors
from adaptc.ir.graph import Graph

aten = torch.ops.aten


class TokenPlacement:
    """Where virtual and real tokens stand in the longer sequence: in front, or at given positions."""

    def __init__(self, graph: Graph, count: int, ids: fx.Node, like: fx.Node, positions: fx.Node | None):
        self.graph, self.count, self.ids, self.like = graph, count, ids, like
        self.before = {n: n.meta["val"] for n in graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)}
        self.order = self.real = None
        if positions is not None:
            with graph.module.graph.inserting_before(next(n for n in graph.nodes if n.op == "call_function")):
                self._arrange(positions)

    def _arrange(self, positions: fx.Node) -> None:
        """`order`: which of [virtual; real] stands where; `real`: where the real tokens stand.

        A virtual token whose place lies behind the end of a short sequence comes at its end.
        """
        length = self._call(aten.sym_size.int, self.ids, 1)
        own = self._call(aten.arange.default, self.count)
        at = self._call(aten.minimum.default, positions, self._call(aten.add.Tensor, own, length))
        free = self._call(aten.sub.Tensor, at, own)  # how many real tokens stand before each virtual one
        real = self._call(aten.arange.default, length)
        passed = self._call(aten.le.Tensor, free, self._call(aten.unsqueeze.default, real, 1))
        self.real = self._call(aten.add.Tensor, real, self._call(aten.sum.dim_IntList, passed, [1]))
        self.order = self._call(aten.argsort.default, self._call(aten.cat.default, [at, self.real]))

    def lengthen(self, node: fx.Node, axis: int, filler: int | str | None, first: fx.Node) -> None:
        """Let all that reads an input read a longer one."""
        users = [user for user in node.users if user.op != "output"]
        mine = set() if self.order is None else {n for n in self.graph.nodes if n in ancestors(self.order)}
        with self.graph.module.graph.inserting_before(first):
            real = node
            if filler == "position":
                real = self._call(aten.add.Tensor, node, self.count)
            shown = self._call(aten.slice.Tensor, node, axis, 0, 1)
            sizes = [-1] * node.meta["val"].dim()
            sizes[axis] = self.count
            if filler == "position":
                virtual = self._call(aten.expand.default, self._call(aten.zeros_like.default, shown), sizes)
                counted = self._call(aten.arange.default, self.count)
                virtual = self._call(aten.add.Tensor, virtual, counted)
            else:
                full = self._call(aten.full_like.default, shown, filler)
                virtual = self._call(aten.expand.default, full, sizes)
            longer = self.joined(virtual, real, axis)
        for user in users:
            if user not in mine:
                user.replace_input_with(node, longer)

    def put(self, tokens: fx.Node, embedded: fx.Node) -> None:
        """The virtual tokens in their places among the embedded ones."""
        users = list(embedded.users)
        following = embedded.next
        with self.graph.module.graph.inserting_before(following):
            real = self.without(embedded, 1)
            batch = self._call(aten.sym_size.int, self.ids, 0)
            virtual = self._call(
                aten.expand.default, self._call(aten.unsqueeze.default, tokens, 0), [batch, -1, -1]
            )
            if virtual.meta["val"].dtype != embedded.meta["val"].dtype:
                virtual = self._call(aten.to.dtype, virtual, embedded.meta["val"].dtype)
            joined = self.joined(virtual, real, 1)
        for user in users:
            user.replace_input_with(embedded, joined)

    def joined(self, virtual: fx.Node, real: fx.Node, axis: int) -> fx.Node:
        """Both in their places."""
        whole = self._call(aten.cat.default, [virtual, real], axis)
        return whole if self.order is None else self._call(aten.index_select.default, whole, axis, self.order)

    def without(self, node: fx.Node, axis: int) -> fx.Node:
        """The real tokens of a value."""
        if self.real is not None:
            return self._call(aten.index_select.default, node, axis, self.real)
        return self._call(aten.slice.Tensor, node, axis, self.count, 2**63 - 1)

    def restore_outputs(self) -> None:
        """Outputs of the real tokens only: on every axis that the virtual ones have made longer.

        Raises:
            ValueError: an output has another length than the tokens, which depends on theirs.
        """
        output = next(node for node in self.graph.nodes if node.op == "output")
        for node in list(output.all_input_nodes):
            before, now = self.before.get(node), node.meta.get("val")
            if before is None or not isinstance(now, torch.Tensor):
                continue
            result = node
            with self.graph.module.graph.inserting_before(output):
                for axis, (old, new) in enumerate(zip(before.shape, now.shape, strict=True)):
                    if str(old) == str(new):
                        continue
                    grown: Any = new - old
                    if sympy.simplify(grown.node.expr) != self.count:
                        raise ValueError(f"{node.name} has a length of {old}, which would be {new}")
                    result = self.without(result, axis)
            output.replace_input_with(node, result)

    def _call(self, target: Any, *args: Any) -> fx.Node:
        return self.graph.call(target, *args, like=self.like)
