"""Virtual tokens among real ones: inputs are made longer, tokens put in, and outputs cut to the real tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from adaptc.inputs import IGNORED, LABELS
from adaptc.ir.analysis.dataflow import ancestors
from adaptc.ir.graph import Graph
from adaptc.ir.nodes import REAL, module_of

aten = torch.ops.aten


class TokenPlacement:
    """Where virtual and real tokens are in the longer sequence: in front, or at given positions.

    Args:
        graph: the host.
        count: how many virtual tokens.
        ids: the input of the real tokens, `(batch, seq)`.
        like: the node that inserted operations take their origin from.
        positions: the node of the virtual tokens' positions `(count,)`; None to put them in front.
    """

    def __init__(self, graph: Graph, count: int, ids: fx.Node, like: fx.Node, positions: fx.Node | None):
        self.graph, self.count, self.ids, self.like = graph, count, ids, like
        self.original_values = {
            n: n.meta["val"] for n in graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)
        }
        self.order = self.real = None
        if positions is not None:
            with graph.module.graph.inserting_before(next(n for n in graph.nodes if n.op == "call_function")):
                self._arrange(positions)

    def _arrange(self, positions: fx.Node) -> None:
        """Compute `order`, the index in [virtual; real] of each token, and `real`, the positions of the real tokens.

        A virtual token whose position is beyond the end of a short sequence goes to its end.
        """
        length = self._call(aten.sym_size.int, self.ids, 1)
        numbers = self._numbers(self.count)
        last = self._call(aten.add.Tensor, numbers, length)
        virtual = self._call(aten.minimum.default, positions, last)
        real_before = self._call(aten.sub.Tensor, virtual, numbers)  # each virtual token
        real = self._numbers(length)
        virtual_before = self._call(aten.le.Tensor, real_before, self._call(aten.unsqueeze.default, real, 1))
        self.real = self._call(aten.add.Tensor, real, self._call(aten.sum.dim_IntList, virtual_before, [1]))
        self.order = self._call(aten.argsort.default, self._call(aten.cat.default, [virtual, self.real]))

    def _numbers(self, count: int | fx.Node) -> fx.Node:
        """`0..count-1`, on the device of the token ids."""
        return self._call(aten.arange.default, count, device=self._call(getattr, self.ids, "device"))

    def lengthen(self, node: fx.Node, axis: int, filler: int | str | None, first: fx.Node) -> None:
        """Let all that reads an input read a longer one.

        Args:
            node: the input.
            axis: the axis of its tokens.
            filler: the value for a virtual token; "position" to count virtual tokens first, and real ones after them.
            first: the node to insert operations in front of.
        """
        users = [user for user in node.users if user.op != "output"]
        order = set[fx.Node]() if self.order is None else ancestors(self.order)
        with self.graph.module.graph.inserting_before(first):
            real = node
            if filler == "position":
                real = self._call(aten.add.Tensor, node, self.count)
            shown = self._call(aten.slice.Tensor, node, axis, 0, 1)
            sizes = [-1] * node.meta["val"].dim()
            sizes[axis] = self.count
            if filler == "position":
                virtual = self._call(aten.expand.default, self._call(aten.zeros_like.default, shown), sizes)
                counted = self._numbers(self.count)
                virtual = self._call(aten.add.Tensor, virtual, counted)
            else:
                full = self._call(aten.full_like.default, shown, filler)
                virtual = self._call(aten.expand.default, full, sizes)
            longer = self.joined(virtual, real, axis)
        self._mark(longer, node)
        for user in users:
            if user not in order:
                user.replace_input_with(node, longer)

    def put(self, tokens: fx.Node, embedded: fx.Node) -> None:
        """Let all that reads the embedded tokens read them with the virtual tokens among them.

        Args:
            tokens: the virtual tokens, `(count, features)`.
            embedded: the embedded tokens of the longer sequence, `(batch, count + seq, features)`.
        """
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
        self._mark(joined, embedded)
        for user in users:
            user.replace_input_with(embedded, joined)

    def joined(self, virtual: fx.Node, real: fx.Node, axis: int) -> fx.Node:
        """The values of virtual and of real tokens as one sequence along an axis."""
        joined = self._call(aten.cat.default, [virtual, real], axis)
        return (
            joined if self.order is None else self._call(aten.index_select.default, joined, axis, self.order)
        )

    def without(self, node: fx.Node, axis: int) -> fx.Node:
        """The values of the real tokens along an axis."""
        if self.real is not None:
            return self._call(aten.index_select.default, node, axis, self.real)
        return self._call(aten.slice.Tensor, node, axis, self.count, 2**63 - 1)

    def restore_outputs(self) -> None:
        """Cut outputs to the real tokens, on every axis that the virtual tokens have made longer.

        Raises:
            ValueError: an axis has grown by another number than that of the virtual tokens.
        """
        output = next(node for node in self.graph.nodes if node.op == "output")
        for node in list(output.all_input_nodes):
            before, now = self.original_values.get(node), node.meta.get("val")
            if before is None or not isinstance(now, torch.Tensor):
                continue
            result = node
            with self.graph.module.graph.inserting_before(output):
                for axis, (old, new) in enumerate(zip(before.shape, now.shape, strict=True)):
                    if str(old) == str(new):
                        continue
                    grown: Any = new - old
                    if grown.node.expr.simplify() != self.count:
                        raise ValueError(f"{node.name} has a length of {old}, which would be {new}")
                    result = self.without(result, axis)
                    self._mark(result, node)
            output.replace_input_with(node, result)

    def _mark(self, node: fx.Node, real: fx.Node) -> None:
        """Note which node has the value for the real tokens alone, were there no virtual tokens."""
        node.meta[REAL] = self.ids.name, real.name, self.order is None

    def _call(self, target: object, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call(target, *args, like=self.like, **kwargs)


def filler_of(graph: Graph, node: fx.Node, ids: fx.Node) -> int | str | None:
    """The value of an input for a virtual token; "position" where it counts tokens; None where that is not known."""
    name = str(node.target)
    if (
        node is ids
    ):  # its embedding is never read, but a mask may be computed from it: any id that is not padding
        config = getattr(graph.source.pretrained, "config", None)
        return 1 if getattr(config, "pad_token_id", 0) != 1 else 0
    if name == LABELS:
        return IGNORED
    dtype = node.meta["val"].dtype
    if (
        "mask" in name and dtype.is_floating_point
    ):  # a token is 1 in a mask that multiplies, 0 in one that is added
        return None
    if "padding_mask" in name and dtype == torch.bool:  # torch's own: true where a token is padding
        return 0
    fillers: Mapping[str, int | str] = {"position": "position", "mask": 1, "token_type_ids": 0}
    return next((filler for part, filler in fillers.items() if part in name), None)


def end_of_module(graph: Graph, embedding: fx.Node) -> fx.Node:
    """The last operation of an embedding's module, which may scale the rows that it looked up.

    Behind virtual tokens that are there already, it is what gives the embedded tokens without them.
    """
    node, module = embedding, module_of(embedding)[0]
    lengthened = {other.meta[REAL][1] for other in graph.nodes if REAL in other.meta}
    while len(node.users) == 1 and module and module_of(next(iter(node.users)))[0] == module:
        before, node = node, next(iter(node.users))
        if before.name in lengthened and node.name not in lengthened:
            break
    return node
