"""Insert an input method: virtual tokens among the embedded ones; the model runs on a longer sequence."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from adaptc.errors import Refusal
from adaptc.expression import splice, trace_expression
from adaptc.graph import Graph
from adaptc.insert import Insert
from adaptc.kinds import InputMethod
from adaptc.select import Selection
from adaptc.shapes import refresh
from adaptc.sites import module_of
from adaptc.tracing.export import LABELS
from adaptc.weights import Held

aten = torch.ops.aten
IGNORED = -100
"""The label that cross entropy leaves out."""


class InsertInput(Insert):
    """`E(ids)` becomes `[P; E(ids)]`; masks, types and labels are as long; outputs are those of the real tokens.

    Every input with the same dynamic dimension is made longer where it enters the graph, so that whatever the model
    computes from their sizes follows: positions, masks, views.
    """

    def requires(self, graph: Graph) -> list[Refusal]:
        """One sequence of a dynamic length, beside inputs whose meaning is known."""
        found = super().requires(graph)
        if found:
            return found
        sites = list(self.selection(graph).sites)
        if len(sites) > 1:
            names = ", ".join(site.module for site in sites)
            return [
                Refusal(f"{self.name}: virtual tokens go into one sequence, but the target names {names}")
            ]
        ids = graph.by_name()[sites[0].reads]
        if not isinstance(ids.meta["val"].shape[1], torch.SymInt):
            words = f"{self.name}: the length of {ids.target} is fixed, so nothing can be put in front"
            spec = next(spec for spec in graph.inputs if spec.name == ids.target)
            dims = ", ".join(map(str, (*spec.dims[:1], "seq")))
            return [
                Refusal(f"{words}: make it dynamic, such as {ids.target}: {spec.dtype}[{dims}]", (ids.name,))
            ]
        unknown = [str(n.target) for n, _ in _beside(graph, ids) if _filler(graph, n, ids) is None]
        if unknown:
            words = f"{self.name}: it is not known what the input {unknown[0]!r} is for a virtual token"
            known = (
                "inputs of that length are known by their names: *mask*, token_type_ids, labels, *position*"
            )
            return [Refusal(f"{words}\n  {known}", (unknown[0],))]
        return []

    def call(self, graph: Graph) -> bool:
        """Make the inputs longer, put the tokens in, and take their places out of the outputs again."""
        sites = self.selection(graph).sites
        (site,) = sites
        method = self.method
        nodes = graph.by_name()
        named = self.tensors(site, sites)
        theta = self.attached(graph, site, named, graph.parameter_node(site.parameter))
        tag = self.recorded(graph, site, named)
        values = {k: node.meta["val"] for k, node in theta.items()}

        def tokens_of(**theta: torch.Tensor) -> torch.Tensor:
            return method.tokens(**theta)[: method.num_virtual_tokens]

        with graph.fake_mode:
            traced = trace_expression(tokens_of, [], values)
        embedding, ids = nodes[site.uses[0].node], nodes[site.reads]
        first = next(node for node in graph.nodes if node.op == "call_function")
        tokens = splice(graph, traced, list(theta.values()), embedding, tag, before=first)
        places = _Places(graph, method.num_virtual_tokens, ids, embedding, self._positions(graph, method))
        for node, axis in _beside(graph, ids):
            places.lengthen(node, axis, _filler(graph, node, ids), first)
        refresh(graph)
        places.put(tokens, _end_of_module(embedding))
        refresh(graph)
        places.restore_outputs()
        return True

    def selection(self, graph: Graph) -> Selection:
        """What the target matches: of several sequences the first input's, where all are meant."""
        found = super().selection(graph)
        if list(self.target) != ["*"] or len(found.sites) < 2:
            return found
        names = [spec.name for spec in graph.inputs]
        first = min(found.sites, key=lambda site: names.index(site.reads))
        return dataclasses.replace(found, sites=(first,))

    def _positions(self, graph: Graph, method: InputMethod) -> fx.Node | None:
        """The node of the places that are given."""
        if not method.positions:
            return None
        name = f"{method.name.replace('-', '_')}_positions.{self.adapter}"
        graph.attach(name, Held(torch.tensor(method.positions)), trained=False, stored=False)
        return graph.parameter_node(name)


def _beside(graph: Graph, ids: fx.Node) -> list[tuple[fx.Node, int]]:
    """The inputs that have the dimension of a sequence, that itself among them, and which of theirs it is."""
    dims = {spec.name: spec.dims for spec in graph.inputs}
    length = dims[str(ids.target)][1]
    held = [(node, dims[str(node.target)]) for node in graph.placeholders]
    return [(node, own.index(length)) for node, own in held if length in own]


def _filler(graph: Graph, node: fx.Node, ids: fx.Node) -> int | str | None:
    """What an input is for a virtual token; "position" where it goes on counting."""
    name = str(node.target)
    if node is ids:  # never looked up, and no padding
        config = getattr(graph.base.pretrained, "config", None)
        return 1 if getattr(config, "pad_token_id", 0) != 1 else 0
    if name == LABELS:
        return IGNORED
    fillers: Mapping[str, int | str] = {"position": "position", "mask": 1, "token_type_ids": 0}
    return next((filler for part, filler in fillers.items() if part in name), None)


def _end_of_module(embedding: fx.Node) -> fx.Node:
    """The last operation of an embedding's module, which may scale what it looked up."""
    node, module = embedding, module_of(embedding)[0]
    while len(node.users) == 1 and module and module_of(next(iter(node.users)))[0] == module:
        node = next(iter(node.users))
    return node


class _Places:
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
        mine = set() if self.order is None else {n for n in self.graph.nodes if n in _behind(self.order)}
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
        """Outputs of the real tokens only: on every axis that the virtual ones have made longer."""
        output = next(node for node in self.graph.nodes if node.op == "output")
        for node in list(output.all_input_nodes):
            before, now = self.before.get(node), node.meta.get("val")
            if before is None or not isinstance(now, torch.Tensor):
                continue
            result = node
            with self.graph.module.graph.inserting_before(output):
                for axis, (old, new) in enumerate(zip(before.shape, now.shape, strict=True)):
                    if str(old) != str(new):
                        result = self.without(result, axis)
            output.replace_input_with(node, result)

    def _call(self, target: Any, *args: Any) -> fx.Node:
        return self.graph.call(target, *args, like=self.like)


def _behind(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    queue = [node]
    while queue:
        node = queue.pop()
        if node not in found:
            found.add(node)
            queue += node.all_input_nodes
    return found
