"""Insert an input method: virtual tokens among the embedded ones; the model runs on a longer sequence."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from adaptc.errors import Refusal, RefusedError
from adaptc.inputs import IGNORED, LABELS
from adaptc.ir.graph import Graph
from adaptc.ir.nodes import module_of
from adaptc.ir.selection import Selection
from adaptc.ir.verify import refresh
from adaptc.methods.point_sites import InputSite
from adaptc.methods.virtual_tokens import InputMethod
from adaptc.rewriter.expression import splice
from adaptc.rewriter.insert.base import Insert
from adaptc.rewriter.insert.virtual_tokens import TokenPlacement
from adaptc.weights import Held

aten = torch.ops.aten


@dataclass(frozen=True)
class InsertInput(Insert[InputMethod], inserts=InputMethod):
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
        ids = graph.by_name()[sites[0].ids]
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
                "inputs of that length are known by their names: token_type_ids, labels, *position*, *mask*"
            )
            known += " (of integers or booleans)"
            return [Refusal(words, (unknown[0],), (known,))]
        return []

    def call(self, graph: Graph) -> bool:
        """Make the inputs longer, put the tokens in, and take their places out of the outputs again."""
        sites = self.selection(graph).sites
        (site,) = sites
        method = self.method
        nodes = graph.by_name()
        named = self.tensors(site, sites)
        theta = self.attached(graph, site, named, graph.base_value(site.parameter))
        mark = self.recorded(graph, site, named)
        values = {k: node.meta["val"] for k, node in theta.items()}

        def tokens_of(**theta: torch.Tensor) -> torch.Tensor:
            return method.tokens(**theta)[: method.num_virtual_tokens]

        with graph.fake_mode:
            traced = self.traced(method, "tokens", site, tokens_of, [], values)
        embedding, ids = nodes[site.node], nodes[site.ids]
        first = next(node for node in graph.nodes if node.op == "call_function")
        tokens = splice(graph, traced, list(theta.values()), embedding, mark, before=first)
        places = TokenPlacement(
            graph, method.num_virtual_tokens, ids, embedding, self._positions(graph, method)
        )
        for node, axis in _beside(graph, ids):
            places.lengthen(node, axis, _filler(graph, node, ids), first)
        refresh(graph)
        places.put(tokens, _end_of_module(embedding))
        refresh(graph)
        try:
            places.restore_outputs()
        except ValueError as error:
            words = f"{self.name}: an output cannot be cut to the real tokens: {error}"
            raise RefusedError([Refusal(words, (embedding.name,))], self) from error
        return True

    def selection(self, graph: Graph) -> Selection[InputSite]:
        """What the target matches: of several sequences the first input's, where all are meant."""
        found = super().selection(graph)
        if list(self.target) != ["*"] or len(found.sites) < 2:
            return found
        names = [spec.name for spec in graph.inputs]
        first = min(found.sites, key=lambda site: names.index(site.ids))
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
        config = getattr(graph.source.pretrained, "config", None)
        return 1 if getattr(config, "pad_token_id", 0) != 1 else 0
    if name == LABELS:
        return IGNORED
    dtype = node.meta["val"].dtype
    if (
        "mask" in name and dtype.is_floating_point
    ):  # 1 where a token counts, or 0 where nothing is subtracted?
        return None
    if "padding_mask" in name and dtype == torch.bool:  # torch's own: true where a token is none
        return 0
    fillers: Mapping[str, int | str] = {"position": "position", "mask": 1, "token_type_ids": 0}
    return next((filler for part, filler in fillers.items() if part in name), None)


def _end_of_module(embedding: fx.Node) -> fx.Node:
    """The last operation of an embedding's module, which may scale what it looked up."""
    node, module = embedding, module_of(embedding)[0]
    while len(node.users) == 1 and module and module_of(next(iter(node.users)))[0] == module:
        node = next(iter(node.users))
    return node
