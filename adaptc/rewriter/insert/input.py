"""Insert an input method: virtual tokens among the embedded ones; the model runs on a longer sequence."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import fx

from adaptc.errors import Refusal, RefusedError
from adaptc.ir.graph import Graph
from adaptc.ir.selection import Selection
from adaptc.ir.verify import refresh
from adaptc.methods.point_sites import InputSite
from adaptc.methods.virtual_tokens import InputMethod
from adaptc.rewriter.expression import splice
from adaptc.rewriter.insert.base import Insert
from adaptc.rewriter.insert.virtual_tokens import TokenPlacement, end_of_module, filler_of
from adaptc.weights import Held

aten = torch.ops.aten


@dataclass(frozen=True)
class InsertInput(Insert[InputMethod, InputSite], inserts=InputMethod):
    """`E(ids)` becomes `[P; E(ids)]`; masks, types and labels grow too; outputs are those of the real tokens.

    Every input with the dynamic dimension of the sequence is made longer where it enters the graph, so that all that
    the model computes from its size grows too: positions, masks, views.
    """

    def requires(self, graph: Graph) -> list[Refusal]:
        """The target names one sequence of dynamic length, and inputs of that length are known by their names."""
        refusals = super().requires(graph)
        if refusals:
            return refusals
        sites = list(self.selection(graph).sites)
        if len(sites) > 1:
            names = ", ".join(site.module for site in sites)
            return [
                Refusal(f"{self.name}: virtual tokens go into one sequence, but the target names {names}")
            ]
        ids = graph.by_name()[sites[0].ids]
        if not isinstance(ids.meta["val"].shape[1], torch.SymInt):
            reason = f"{self.name}: the length of {ids.target} is fixed, so nothing can be put in front"
            spec = next(spec for spec in graph.inputs if spec.name == ids.target)
            dims = ", ".join(map(str, (*spec.dims[:1], "seq")))
            return [
                Refusal(f"{reason}: make it dynamic, such as {ids.target}: {spec.dtype}[{dims}]", (ids.name,))
            ]
        unknown = [str(n.target) for n, _ in _sequences(graph, ids) if filler_of(graph, n, ids) is None]
        if unknown:
            reason = f"{self.name}: it is not known what the input {unknown[0]!r} is for a virtual token"
            note = (
                "inputs of that length are known by their names: token_type_ids, labels, *position*, *mask* "
                "(of integers or booleans)"
            )
            return [Refusal(reason, (unknown[0],), (note,))]
        return []

    def call(self, graph: Graph) -> bool:
        """Make the inputs longer, put the virtual tokens in, and cut the outputs to the real tokens."""
        sites = self.selection(graph).sites
        (site,) = sites
        method = self.method
        nodes = graph.by_name()
        tensors = self.tensors(site, sites)
        theta = self.attached(graph, site, tensors, graph.base_value(site.parameter))
        mark = self.recorded(graph, site, tensors)
        values = {k: node.meta["val"] for k, node in theta.items()}

        def tokens_of(**theta: torch.Tensor) -> torch.Tensor:
            return method.tokens(**theta)[: method.num_virtual_tokens]

        with graph.fake_mode:
            traced = self.traced(method, "tokens", site, tokens_of, [], values)
        embedding, ids = nodes[site.node], nodes[site.ids]
        first = next(node for node in graph.nodes if node.op == "call_function")
        tokens = splice(graph, traced, list(theta.values()), embedding, mark, before=first)
        positions = self._positions(graph, method)
        placement = TokenPlacement(graph, method.num_virtual_tokens, ids, embedding, positions)
        for node, axis in _sequences(graph, ids):
            placement.lengthen(node, axis, filler_of(graph, node, ids), first)
        refresh(graph)
        placement.put(tokens, end_of_module(graph, embedding))
        refresh(graph)
        try:
            placement.restore_outputs()
        except ValueError as error:
            reason = f"{self.name}: an output cannot be cut to the real tokens: {error}"
            raise RefusedError([Refusal(reason, (embedding.name,))], self) from error
        return True

    def selection(self, graph: Graph) -> Selection[InputSite]:
        """The sequences that the target matches; of several that `*` matches, the one of the first input."""
        selection = super().selection(graph)
        if list(self.target) != ["*"] or len(selection.sites) < 2:
            return selection
        names = [spec.name for spec in graph.inputs]
        first = min(selection.sites, key=lambda site: names.index(site.ids))
        return dataclasses.replace(selection, sites=(first,))

    def _positions(self, graph: Graph, method: InputMethod) -> fx.Node | None:
        """The node of the positions that the method's options give its virtual tokens; None where they go in front."""
        if not method.positions:
            return None
        name = f"{method.name.replace('-', '_')}_positions.{self.adapter}"
        graph.attach(name, Held(torch.tensor(method.positions)), trained=False, stored=False)
        return graph.parameter_node(name)


def _sequences(graph: Graph, ids: fx.Node) -> list[tuple[fx.Node, int]]:
    """The inputs that have the dynamic dimension of `ids`, itself among them, each with the axis of that dimension."""
    dims = {spec.name: spec.dims for spec in graph.inputs}
    length = dims[str(ids.target)][1]
    inputs = [(node, dims[str(node.target)]) for node in graph.placeholders]
    return [(node, sizes.index(length)) for node, sizes in inputs if length in sizes]
