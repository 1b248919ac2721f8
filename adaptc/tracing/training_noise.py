"""Operations that a model runs in training only: dropout, and any other noise that replaces a value."""

# An operator's overload is named by private attributes only.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import map_arg

from adaptc.ir.nodes import PROVENANCE, writes_in_place
from adaptc.ir.training_mode import training_node

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""The positional and the keyword arguments of an operation."""
aten = torch.ops.aten
IDENTITIES = {aten.contiguous.default, aten.clone.default, aten.alias.default}
"""Operations that return their operand's value. A trace has them or not, depending on the memory layout."""


def bare(node: fx.Node) -> fx.Node:
    """The node upstream whose value this one only passes on; itself where it computes a value."""
    while node.target in IDENTITIES:
        node = cast(fx.Node, node.args[0])
    return node


def is_size(node: fx.Node) -> bool:
    """Whether a node computes a size, a flag or a device, not a tensor."""
    value = node.meta.get("val")
    return node.op == "call_function" and not isinstance(value, (torch.Tensor, tuple, list, type(None)))


@dataclass(frozen=True)
class _Origin:
    """What a noisy value was computed from.

    Attributes:
        sources: the tensors of both modes.
        drawn: random numbers were drawn for it.
    """

    sources: frozenset[fx.Node]
    drawn: bool


class Noise:
    """The operations of training only, inserted into the graph in evaluation mode.

    A noisy value may replace one of ours in training if it is a function of that value and of random draws, and of
    nothing else: dropout, router jitter, stochastic depth.

    Args:
        graph: the graph in evaluation mode; it is changed in place.
        mode: the fake-tensor mode of its values.
    """

    def __init__(self, graph: fx.Graph, mode: FakeTensorMode):
        self.graph, self.mode = graph, mode
        self._origins: dict[fx.Node, _Origin] = {}
        self._selected: dict[fx.Node, fx.Node] = {}
        self._inserted: list[fx.Node] = []

    def __contains__(self, node: object) -> bool:
        return node in self._origins

    def insert(self, theirs: fx.Node, operand: Callable[[fx.Node], Any], before: fx.Node) -> fx.Node:
        """Copy an operation of the training trace; an in-place one becomes one that leaves its operand as it is.

        Args:
            theirs: the operation.
            operand: gives our node for one of its operands.
            before: the node in front of which it is inserted.
        """
        args, kwargs = cast(Arguments, map_arg(cast(Any, (theirs.args, dict(theirs.kwargs))), operand))
        target: Any = theirs.target
        if target is aten.dropout.default:
            args = (*args[:2], training_node(self.graph))
        elif writes_in_place(target) and args[0] not in self:
            target = _without_writing(target)
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, tuple(args), kwargs)
        node.meta = {key: value for key, value in theirs.meta.items() if key in PROVENANCE}
        self._record(node)
        if not is_size(node):
            self._origins[node] = self._origin(node)
        return node

    def stands_for(self, node: fx.Node, ours: fx.Node) -> bool:
        """Whether a noisy value may replace one of ours in training."""
        origin, a, b = self._origins[node], node.meta["val"], ours.meta["val"]
        return (
            origin.drawn
            and origin.sources == frozenset({bare(ours)})
            and a.dtype == b.dtype
            and a.dim() == b.dim()
        )

    def select(self, node: fx.Node, ours: fx.Node, before: fx.Node) -> fx.Node:
        """The node that gives the noisy value in training, ours in evaluation.

        It selects by a dropout with probability 1 of a 1, so that a saved program can follow both modes too.
        """
        if node.target is aten.dropout.default and bare(cast(fx.Node, node.args[0])) is bare(ours):
            return node
        if node not in self._selected:
            flag = training_node(self.graph)
            with self.graph.inserting_before(before):
                one = self._call(aten.new_ones.default, ours, [])
                dropped = self._call(aten.dropout.default, one, 1.0, flag)
                evaluating = self._call(aten.gt.Scalar, dropped, 0)
                self._selected[node] = self._call(aten.where.self, evaluating, ours, node)
        return self._selected[node]

    def clean(self) -> None:
        """Erase inserted nodes that nothing reads, such as a size that both modes compute."""
        for node in reversed(self._inserted):
            if not node.users:
                self.graph.erase_node(node)

    def _call(self, target: Any, *args: Any) -> fx.Node:
        node = self.graph.call_function(target, args)
        self._record(node)
        return node

    def _record(self, node: fx.Node) -> None:
        """Compute the fake value of a node that was inserted."""
        operands = map_arg(cast(Any, (node.args, dict(node.kwargs))), lambda n: n.meta.get("val", False))
        args, kwargs = cast(Arguments, operands)
        with self.mode, torch.no_grad():
            node.meta["val"] = cast(Callable[..., Any], node.target)(*args, **kwargs)
        self._inserted.append(node)

    def _origin(self, node: fx.Node) -> _Origin:
        sources: set[fx.Node] = set()
        drawn = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        for operand in node.all_input_nodes:
            origin = self._origins.get(operand)
            if origin is not None:
                sources |= origin.sources
                drawn = drawn or origin.drawn
            elif isinstance(operand.meta.get("val"), torch.Tensor):
                sources.add(bare(operand))
        return _Origin(frozenset(sources), drawn)


def _without_writing(target: OpOverload) -> OpOverload:
    """The operation that returns what an in-place one writes: `aten.mul` for `aten.mul_`."""
    namespace, _, name = target.name().split(".")[0].partition("::")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"))
    return getattr(packet, target._overloadname)
