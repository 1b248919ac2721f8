"""What a model computes in training only: dropout, and any other noise in place of a value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from adaptc.ir.nodes import PROVENANCE, writes_in_place
from adaptc.ir.training_mode import training_node

aten = torch.ops.aten
IDENTITIES = {aten.contiguous.default, aten.clone.default, aten.alias.default}
"""Operations that a trace drops or keeps by memory layout, without a change of value."""


def bare(node: fx.Node) -> fx.Node:
    """The node whose value this one passes on."""
    while node.target in IDENTITIES:
        node = node.args[0]  # type: ignore[assignment]
    return node


def is_size(node: fx.Node) -> bool:
    """Whether a node computes no tensor, but a size, a flag or a device."""
    value = node.meta.get("val")
    return node.op == "call_function" and not isinstance(value, (torch.Tensor, tuple, list, type(None)))


@dataclass(frozen=True)
class _Origin:
    """The tensors of both modes that a noisy value was computed from, and whether anything was drawn for it."""

    sources: frozenset[fx.Node]
    drawn: bool


class Noise:
    """The operations of training only, inserted into a graph of evaluation.

    A value may give way to another in training if that one is a function of it and of random draws, and of
    nothing else: dropout, router jitter, stochastic depth.
    """

    def __init__(self, graph: fx.Graph, mode: Any):
        self.graph, self.mode = graph, mode
        self._origins: dict[fx.Node, _Origin] = {}
        self._selected: dict[fx.Node, fx.Node] = {}
        self._inserted: list[fx.Node] = []

    def __contains__(self, node: object) -> bool:
        return node in self._origins

    def insert(self, theirs: fx.Node, operand: Callable[[fx.Node], Any], before: fx.Node) -> fx.Node:
        """Copy an operation of the training trace; what it writes to stays as it was."""
        args, kwargs = map_arg((theirs.args, dict(theirs.kwargs)), operand)  # type: ignore[arg-type]
        target: Any = theirs.target
        if target is aten.dropout.default:
            args = (*args[:2], training_node(self.graph))
        elif writes_in_place(target) and args[0] not in self:  # type: ignore[operator]
            target = _without_writing(target)
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, tuple(args), kwargs)
        node.meta = {key: value for key, value in theirs.meta.items() if key in PROVENANCE}
        self._record(node)
        if not is_size(node):
            self._origins[node] = self._origin(node)
        return node

    def stands_for(self, node: fx.Node, ours: fx.Node) -> bool:
        """Whether a noisy value may take the place of one of ours in training."""
        origin, a, b = self._origins[node], node.meta["val"], ours.meta["val"]
        return origin.drawn and origin.sources == {bare(ours)} and a.dtype == b.dtype and a.dim() == b.dim()

    def select(self, node: fx.Node, ours: fx.Node, before: fx.Node) -> fx.Node:
        """The noisy value in training, ours in evaluation.

        The choice is spelled by dropout of everything, so that a saved program can follow both modes too.
        """
        if node.target is aten.dropout.default and bare(node.args[0]) is bare(ours):  # type: ignore[arg-type]
            return node
        if node not in self._selected:
            flag = training_node(self.graph)
            with self.graph.inserting_before(before):
                one = self._call(aten.new_ones.default, ours, [])
                kept = self._call(aten.dropout.default, one, 1.0, flag)
                evaluates = self._call(aten.gt.Scalar, kept, 0)
                self._selected[node] = self._call(aten.where.self, evaluates, ours, node)
        return self._selected[node]

    def clean(self) -> None:
        """Erase what no value was computed from, such as a size that both modes know."""
        for node in reversed(self._inserted):
            if not node.users:
                self.graph.erase_node(node)

    def _call(self, target: Any, *args: Any) -> fx.Node:
        node = self.graph.call_function(target, args)
        self._record(node)
        return node

    def _record(self, node: fx.Node) -> None:
        args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda n: n.meta.get("val", False))  # type: ignore[arg-type]
        with self.mode, torch.no_grad():
            node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]
        self._inserted.append(node)

    def _origin(self, node: fx.Node) -> _Origin:
        sources: set[fx.Node] = set()
        drawn = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        for operand in node.all_input_nodes:
            known = self._origins.get(operand)
            if known is not None:
                sources |= known.sources
                drawn = drawn or known.drawn
            elif isinstance(operand.meta.get("val"), torch.Tensor):
                sources.add(bare(operand))
        return _Origin(frozenset(sources), drawn)


def _without_writing(target: torch._ops.OpOverload) -> torch._ops.OpOverload:
    namespace, _, name = target.name().split(".")[0].partition("::")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"))
    return getattr(packet, target._overloadname)
