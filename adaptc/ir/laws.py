"""The laws of a graph: what must hold of the whole of it. `stages.STAGE_TABLE` says at which stage each holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import fx

from adaptc.ir.graph import Graph
from adaptc.ir.nodes import ADAPTATION, writes_in_place
from adaptc.ir.state import written_weights

aten = torch.ops.aten
DROPOUTS = frozenset(
    {
        aten.dropout.default,
        aten.feature_dropout.default,
        aten.alpha_dropout.default,
        aten.feature_alpha_dropout.default,
        aten.native_dropout.default,
    }
)
"""Operations that drop values where their third operand, the training mode, is true."""


@dataclass(frozen=True)
class Breach:
    """One thing that is not legal.

    Attributes:
        message: what is wrong, in one line.
        node: the node at fault; None where it is not one node.
    """

    message: str
    node: fx.Node | None = None


Law = Callable[[Graph], Iterator[Breach]]
"""What must hold of a whole graph: gives every breach of it."""


def nothing_is_inserted(graph: Graph) -> Iterator[Breach]:
    """No method has been inserted yet."""
    if graph.adaptations:
        names = ", ".join(dict.fromkeys(adaptation.method.name for adaptation in graph.adaptations))
        yield Breach(f"{names} is inserted, and the graph is still {graph.stage}")


def inserted_tensors_are_read(graph: Graph) -> Iterator[Breach]:
    """Every inserted tensor is read by some operation."""
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    unread = sorted(set(graph.inserted) - read)
    if unread:
        yield Breach(f"inserted, but not read by any operation: {', '.join(unread)}")


def expressions_have_adaptations(graph: Graph) -> Iterator[Breach]:
    """Every node that is marked as part of an adaptation's expression belongs to an adaptation of the graph."""
    adaptations = set(graph.adaptations)
    for node in graph.nodes:
        adaptation = node.meta.get(ADAPTATION)
        if adaptation is not None and adaptation not in adaptations:
            yield Breach(f"%{node.name} is left of {adaptation.method.name} on {adaptation.site}", node)


def no_adapter_is_left(graph: Graph) -> Iterator[Breach]:
    """No tensor is left of an adaptation that folding computes into weights."""
    names = {
        name
        for adaptation in graph.adaptations
        if adaptation.on_alias != "live" and not adaptation.stays
        for name, _ in adaptation.params.values()
    }
    if names:
        yield Breach(f"the folded graph still holds the adapters {', '.join(sorted(names))}")


def weights_are_stored_once(graph: Graph) -> Iterator[Breach]:
    """A quantized weight has all its tensors, and is not stored as floats as well."""
    for name, quantized in graph.quantized.items():
        missing = [tensor for tensor in quantized.tensors.values() if tensor not in graph.weights]
        if missing:
            yield Breach(f"{name} is quantized, but {', '.join(missing)} is missing")
        if name in graph.weights:
            yield Breach(f"{name} is quantized, but its floats are there too")


def nothing_follows_training(graph: Graph) -> Iterator[Breach]:
    """No node reads the module's mode, and no dropout can be active."""
    for node in graph.nodes:
        if node.op == "get_attr" and node.target == "training":
            yield Breach(f"%{node.name} follows the module's mode, and the graph only evaluates", node)
        elif node.target in DROPOUTS and (node.args[2] if len(node.args) > 2 else True) is not False:
            yield Breach(f"%{node.name} can drop values, and the graph only evaluates", node)


def inputs_are_used(graph: Graph) -> Iterator[Breach]:
    """Every input is read by some operation."""
    for node in graph.placeholders:
        if not node.users:
            yield Breach(f"the input {node.target} is not used by any operation", node)


def tied_weights_have_one_name(graph: Graph) -> Iterator[Breach]:
    """A tensor with several names is read under the first of them."""
    for node in graph.nodes:
        if node.op != "get_attr":
            continue
        first = graph.aliases.get(str(node.target), node.target)
        if first != node.target:
            yield Breach(f"{node.target} is read, whose tensor is called {first}", node)


def no_weight_is_written(graph: Graph) -> Iterator[Breach]:
    """No operation changes a weight or buffer in place."""
    for name, node in written_weights(graph.nodes).items():
        yield Breach(f"%{node.name} changes {name} in place", node)


def nothing_is_written(graph: Graph) -> Iterator[Breach]:
    """No operation changes its operands in place: a value is written once."""
    for node in graph.nodes:
        if writes_in_place(node.target):
            yield Breach(f"%{node.name} changes its operand in place", node)
