"""Insert an activation method: its branch is added to a sub-layer's output before the residual sum."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from adaptc.errors import DefinitionError, Fault, Refusal, RefusedError
from adaptc.ir.analysis.points import OUT, OUTPUT
from adaptc.ir.graph import Graph
from adaptc.ir.selection import Selection, select
from adaptc.ir.training_mode import training_node
from adaptc.methods.activation import ActivationMethod
from adaptc.methods.method import Method
from adaptc.methods.point_sites import SubLayer
from adaptc.methods.site import MATRIX_KINDS, SUBLAYER, WeightSite
from adaptc.registry.author import place_of_function
from adaptc.rewriter.expression import splice
from adaptc.rewriter.insert.base import Insert

aten = torch.ops.aten


class _Matrices(Method[WeightSite]):
    """A method that sits on all layers, to select the layers that a target names."""

    kinds = MATRIX_KINDS


@dataclass(frozen=True)
class InsertActivation(Insert[ActivationMethod, SubLayer], inserts=ActivationMethod):
    """`x + h` becomes `x + (h + f(z))` at every sub-layer the target names: h is its output, z its output or input."""

    def refused(self, site: SubLayer) -> Fault | None:
        """The option at fault and why the method cannot be inserted at a site; None if it can."""
        if self.method.reads == "input" and not site.reads:
            return Fault(
                ("target",), "it reads the sub-layer's input: name that too, target: {node: ..., input: ...}"
            )
        if site.width is None:
            return Fault(
                (), "the features of its output are not on the last axis, or their number is not fixed"
            )
        return super().refused(site)

    def selection(self, graph: Graph) -> Selection[SubLayer]:
        """The sub-layers that the target matches.

        `lacking` says what to do about a layer that ends a sub-layer, but is followed by no residual sum.
        """
        selection = super().selection(graph)
        if isinstance(self.target, Mapping) and self.target.get("node"):
            return selection
        with_sum = {point.module for point in graph.points if point.kind == SUBLAYER}
        layers = select(graph, self.target, self.exclude, _Matrices())
        ends = [s for s in layers.sites if graph.roles.of.get(s.uses[0], set()) & {OUTPUT, OUT}]
        lacking = [site for site in ends if site.module not in with_sum]
        if not lacking:
            return selection
        first, node = lacking[0], lacking[0].uses[0].node
        lines = (
            f"no residual sum was found downstream of {first.module or 'the model itself'}, at node {node}"
            + (f", from {first.source}" if first.source else ""),
            f"name the point: target: {{node: {node}}}, or leave it out with `exclude`",
        )
        return dataclasses.replace(selection, lacking=(*lines, *selection.lacking))

    def call(self, graph: Graph) -> bool:
        """Splice the branch in at every site, and add its result."""
        sites = self.selection(graph).sites
        nodes = graph.by_name()
        for site in sites:
            self._insert(graph, site, nodes, sites)
        return True

    def _insert(
        self, graph: Graph, site: SubLayer, nodes: dict[str, fx.Node], sites: tuple[SubLayer, ...]
    ) -> None:
        method = self.method.at(site)
        tensors = self.tensors(site, sites)
        theta = self.attached(graph, site, tensors, None)
        mark = self.recorded(graph, site, tensors)
        first, output = _entry(graph, site, nodes)
        users = list(output.users) if site.value else [nodes[use.node] for use in site.uses]
        read = nodes[site.reads] if method.reads == "input" else output
        order = {node: index for index, node in enumerate(graph.nodes)}
        if order[read] >= order[first]:
            reason = f"{method.name}: its input {read.name} is computed after {site.node}"
            raise RefusedError([Refusal(reason, (read.name,), (f"site {site}",))], self)
        if str(read.meta["val"].shape) != str(output.meta["val"].shape):
            shapes = [list(node.meta["val"].shape) for node in (read, output)]
            reason = (
                f"{method.name}: its input {read.name} is {shapes[0]}, its output {output.name} {shapes[1]}"
            )
            raise RefusedError([Refusal(reason, (read.name,), (f"site {site}",))], self)
        with graph.module.graph.inserting_before(first):
            z = read
            if method.dropout:
                z = graph.call(
                    aten.dropout.default, z, method.dropout, training_node(graph.module.graph), like=output
                )
        values = {argument: node.meta["val"] for argument, node in theta.items()}
        with graph.fake_mode:
            traced = self.traced(method, "branch", site, method.branch, [z.meta["val"]], values, whole=True)
        branch = splice(graph, traced, [z, *theta.values()], output, mark, before=first)
        if branch.meta["val"].shape[-1] != output.meta["val"].shape[-1]:
            raise DefinitionError(
                f"method {method.name!r}: branch gives {list(branch.meta['val'].shape)} of {list(z.meta['val'].shape)} "
                f"on {site}",
                place_of_function(method.branch),
            )
        with graph.module.graph.inserting_before(first):
            total = graph.call(aten.add.Tensor, output, branch, like=output)
        for user in users:
            user.replace_input_with(output, total)
        if site.value:
            graph.adapted_activations[site.value] = total.name
            nodes[total.name] = total


def _entry(graph: Graph, site: SubLayer, nodes: dict[str, fx.Node]) -> tuple[fx.Node, fx.Node]:
    """Where a branch goes, as earlier entries have left the graph.

    Returns:
        The node to insert it in front of, and the node whose value it is added to.
    """
    if not site.value:
        use = site.uses[0]
        output: Any = nodes[use.node].args[use.argument]
        return nodes[use.node], output
    output = nodes[graph.adapted_activations.get(site.value, site.value)]
    return output.next, output
