"""Insert a head method: what it gives takes the place of an output of the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx
from torch.utils import _pytree as pytree

from adaptc.errors import Refusal
from adaptc.inputs import LABELS
from adaptc.ir.analysis.dataflow import ancestors
from adaptc.ir.analysis.heads import results_of
from adaptc.ir.graph import Graph
from adaptc.ir.selection import Selection
from adaptc.ir.training_mode import training_node
from adaptc.methods.head import HeadMethod
from adaptc.methods.point_sites import HeadSite
from adaptc.methods.site import WEIGHT_KINDS
from adaptc.rewriter.expression import splice
from adaptc.rewriter.insert.base import Insert

aten = torch.ops.aten


@dataclass(frozen=True)
class InsertHead(Insert[HeadMethod, HeadSite], inserts=HeadMethod):
    """`y` becomes `scores(pooled(h, m))`: h are the features that a head reads, m says which tokens are real."""

    def selection(self, graph: Graph) -> Selection[HeadSite]:
        """The places that the target matches; of several the first: heads of the model come before its outputs."""
        selection = super().selection(graph)
        return dataclasses.replace(selection, sites=selection.sites[:1])

    def requires(self, graph: Graph) -> list[Refusal]:
        """One output follows from the features, no loss does, and the tokens that it reads are known."""
        refusals = super().requires(graph)
        if refusals:
            return refusals
        (site,) = self.selection(graph).sites
        reason = self._why_not(graph, site)
        return [Refusal(f"{self.method.name}: {reason[0]}", (), reason[1:])] if reason else []

    def _why_not(self, graph: Graph, site: HeadSite) -> tuple[str, ...]:
        """Why the head cannot be put here, and what to do about it; empty where it can."""
        names = dict(zip(graph.outputs, results_of(_end(graph)), strict=True))
        features, replaced = _features(graph, site), site.output
        if self.method.output in names and self.method.output != replaced:
            return (f"the model gives {self.method.output} already", "give this entry another `output`")
        cut_off = [a for a in graph.adaptations if f"{a.site.module}.".startswith(f"{site.module}.")]
        cut_off = [a for a in cut_off if a.site.kind in WEIGHT_KINDS]
        if cut_off:
            first = cut_off[0]
            return (
                f"it takes the place of {site.module}, which {first.method.name} adapts",
                f"leave {first.site.module} out of that entry: exclude: [{first.site.pattern}]",
            )
        losses = [name for name, value in names.items() if name != replaced and _needs_labels(value)]
        if losses:
            return (
                f"{', '.join(losses)} is computed from the head that the model had",
                f"leave {LABELS} out of the inputs, and compute the loss from {self.method.output}",
            )
        if not replaced:
            return (f"several outputs follow from what {site.module} reads", "target one of them by its name")
        if self.method.token is not None and not site.ids:
            return ("it reads the tokens by their numbers, and no input has these",)
        if site.mask and not _same_sizes(features, graph.by_name()[site.mask]):
            return (
                "virtual tokens in front of it are not told by the mask",
                "write this entry before the one that puts them there",
            )
        return ()

    def call(self, graph: Graph) -> bool:
        """Splice in the pooling and the head, and let the model give what they compute."""
        sites = self.selection(graph).sites
        (site,) = sites
        method = self.method.at(site)
        tensors = self.tensors(site, sites)
        theta = self.attached(graph, site, tensors, None)
        mark = self.recorded(graph, site, tensors)
        features, end = _features(graph, site), _end(graph)
        graph.adapted_activations.setdefault(_key(site), features.name)
        with graph.module.graph.inserting_before(end):
            h = features if site.tokens else graph.call(aten.unsqueeze.default, features, 1, like=features)
            m = _real(graph, site, method.token, h)
        x = self._spliced(graph, site, "pooled", [h, m], theta, mark)
        if method.dropout:
            with graph.module.graph.inserting_before(end):
                training = training_node(graph.module.graph)
                x = graph.call(aten.dropout.default, x, method.dropout, training, like=features)
        y = self._spliced(graph, site, "scores", [x], theta, mark)
        _give(graph, site.output, method.output, y)
        return True

    def _spliced(
        self, graph: Graph, site: HeadSite, hook: str, operands: Sequence[fx.Node],
        theta: dict[str, fx.Node], mark: dict[str, Any],
    ) -> fx.Node:  # fmt: skip
        """The node of one of the method's two expressions on these operands."""
        method = self.method.at(site)
        values = {argument: node.meta["val"] for argument, node in theta.items()}
        with graph.fake_mode:
            given = [node.meta["val"] for node in operands]
            traced = self.traced(method, hook, site, getattr(method, hook), given, values, whole=True)
        return splice(graph, traced, [*operands, *theta.values()], operands[0], mark, before=_end(graph))


def _end(graph: Graph) -> fx.Node:
    """The node of what the graph gives."""
    return next(node for node in reversed(graph.module.graph.nodes) if node.op == "output")


def _key(site: HeadSite) -> str:
    """Under which a graph notes the node of the features, which an earlier head may have cut off from the model."""
    return f"features of {site.module}"


def _features(graph: Graph, site: HeadSite) -> fx.Node:
    """The node of the features, as earlier entries have left the graph."""
    nodes, use = graph.by_name(), site.uses[0]
    noted = graph.adapted_activations.get(_key(site))
    if noted is not None:
        return nodes[noted]
    user = nodes[use.node]
    operand = results_of(user)[use.argument] if user.op == "output" else user.args[use.argument]
    return cast("fx.Node", operand)


def _needs_labels(value: object) -> bool:
    """Whether a value is computed from labels."""
    return isinstance(value, fx.Node) and any(
        n.op == "placeholder" and n.target == LABELS for n in (value, *ancestors(value))
    )


def _same_sizes(features: fx.Node, mask: fx.Node) -> bool:
    """Whether a mask is of as many tokens as there are features of."""
    return str(features.meta["val"].shape[1]) == str(mask.meta["val"].shape[1])


def _real(graph: Graph, site: HeadSite, token: int | None, h: fx.Node) -> fx.Node:
    """Which tokens a head reads `(batch, tokens)`: those of a number, or the real ones; all without a mask."""
    if token is not None:
        return graph.call(aten.eq.Scalar, graph.by_name()[site.ids], token, like=h)
    if site.mask:
        return graph.call(aten.ne.Scalar, graph.by_name()[site.mask], 0, like=h)
    first = graph.call(aten.select.int, h, -1, 0, like=h)
    return graph.call(aten.ones_like.default, first, dtype=torch.bool, like=h)


def _give(graph: Graph, replaced: str, name: str, value: fx.Node) -> None:
    """Let a graph give a value under a name, in the place of one of its outputs, or behind them if that is gone."""
    end = _end(graph)
    named = dict(zip(graph.outputs, results_of(end), strict=True))
    if replaced not in named:
        named[name] = value
    given = {name if n == replaced else n: value if n == replaced else v for n, v in named.items()}
    end.args = (tuple(given.values()),)
    if graph.outputs == tuple(given):
        return
    graph.outputs = tuple(given)
    codegen: Any = graph.module.graph._codegen  # pyright: ignore[reportPrivateUsage] (it has no public name)
    spec = pytree.tree_structure(dict.fromkeys(given, 0))
    codegen.pytree_info = codegen.pytree_info._replace(out_spec=spec)
