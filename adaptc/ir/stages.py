"""The stages of a graph, and what is legal at each: its operations and its laws, in one table.

    traced > adapted > factored         a model, adapters in it, products taken apart for training
             adapted > folded           adapters computed into the weights
                       any > evaluated  what only evaluates, as an exporter wants it
                             evaluated > onnx   operations that ONNX has

A graph with quantized weights is `quantized` besides: what that table allows is legal at its stage too.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from adaptc.ir.graph import Graph
from adaptc.ir.nodes import ADAPTATION, memory_owner, writes_in_place
from adaptc.quantization.operators import DEQUANTIZE, EMBEDDING, LINEAR

aten = torch.ops.aten
OWN = frozenset({"adaptc", "adaptc_onnx"})
"""The libraries of adaptc's own operations, each of which is legal at some stages only."""
DROPOUTS = frozenset(
    {
        aten.dropout.default,
        aten.feature_dropout.default,
        aten.alpha_dropout.default,
        aten.feature_alpha_dropout.default,
        aten.native_dropout.default,
    }
)
"""Operations that drop values where their third operand, the mode, is true."""
SIZE_FUNCTIONS: frozenset[Callable[..., Any]] = frozenset(
    {
        operator.getitem,
        operator.add,
        operator.sub,
        operator.mul,
        operator.floordiv,
        operator.truediv,
        operator.mod,
        operator.neg,
        operator.eq,
        operator.ne,
        operator.lt,
        operator.le,
        operator.gt,
        operator.ge,
        operator.pow,
        torch.sym_max,
        torch.sym_min,
        torch.sym_float,
        torch.sym_int,
        torch.sym_not,
        torch.sym_sum,
        torch.sym_ite,
    }
)
"""Functions on sizes and flags that may stand beside operations on tensors."""


@dataclass(frozen=True)
class Breach:
    """One thing that is not legal: what, and the node at fault where it is one."""

    message: str
    node: fx.Node | None = None


Law = Callable[[Graph], Iterator[Breach]]
"""What must hold of a whole graph: gives every breach of it."""


@dataclass(frozen=True)
class Stage:
    """One row of the table.

    Attributes:
        holds: what a graph at this stage is, in words.
        laws: what must hold of the whole graph.
        functions: Python functions that may be called, besides registered operations of any library but adaptc's.
        own: adaptc's operations that may stand in it.
        own_library: a library of adaptc's all of which may stand in it; empty for none.
    """

    holds: str
    laws: tuple[Law, ...] = ()
    functions: frozenset[Callable[..., Any]] = SIZE_FUNCTIONS | {getattr}
    own: frozenset[torch._ops.OpOverload] = frozenset()
    own_library: str = ""

    def allows(self, target: Any) -> bool:
        """Whether an operation is legal."""
        if not isinstance(target, torch._ops.OpOverload):
            return target in self.functions
        return target.namespace not in OWN or target in self.own or target.namespace == self.own_library


def nothing_is_inserted(graph: Graph) -> Iterator[Breach]:
    """No method has been inserted yet."""
    if graph.adaptations:
        names = ", ".join(dict.fromkeys(adaptation.method.name for adaptation in graph.adaptations))
        yield Breach(f"{names} is inserted, and the graph is still {graph.stage}")


def inserted_are_read(graph: Graph) -> Iterator[Breach]:
    """Every inserted tensor is read by some operation."""
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    unread = sorted(set(graph.inserted) - read)
    if unread:
        yield Breach(f"inserted, but not read by any operation: {', '.join(unread)}")


def expressions_are_known(graph: Graph) -> Iterator[Breach]:
    """Every node that is marked as part of an adaptation's expression is part of one that the graph has."""
    known = set(graph.adaptations)
    for node in graph.nodes:
        adaptation = node.meta.get(ADAPTATION)
        if adaptation is not None and adaptation not in known:
            yield Breach(f"%{node.name} is left of {adaptation.method.name} on {adaptation.site}", node)


def adapters_are_gone(graph: Graph) -> Iterator[Breach]:
    """No adaptation is left that a fold computes into weights."""
    names = {
        name
        for adaptation in graph.adaptations
        if adaptation.on_alias != "live" and not adaptation.stays
        for name, _ in adaptation.params.values()
    }
    if names:
        yield Breach(f"the folded graph still holds the adapters {', '.join(sorted(names))}")


def weights_are_stored_once(graph: Graph) -> Iterator[Breach]:
    """A quantized weight has all its tensors, and is not there as floats besides."""
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
    """A tensor with several names is read under the first."""
    for node in graph.nodes:
        first = graph.aliases.get(str(node.target), node.target) if node.op == "get_attr" else node.target
        if first != node.target:
            yield Breach(f"{node.target} is read, whose tensor is called {first}", node)


def no_weight_is_written(graph: Graph) -> Iterator[Breach]:
    """No operation changes a weight or buffer in place."""
    for node in graph.nodes:
        if writes_in_place(node.target):
            written = memory_owner(node.args[0]) if isinstance(node.args[0], fx.Node) else node
            if written.op == "get_attr":
                yield Breach(f"%{node.name} changes {written.target} in place", node)


def nothing_is_written(graph: Graph) -> Iterator[Breach]:
    """No operation changes its operands: a value is written once."""
    for node in graph.nodes:
        if writes_in_place(node.target):
            yield Breach(f"%{node.name} changes its operand in place", node)


TABLE: dict[str, Stage] = {
    "traced": Stage("the base as torch.export gives it", (nothing_is_inserted,)),
    "adapted": Stage("adapters are in it", (expressions_are_known, inserted_are_read)),
    "factored": Stage(
        "products with adapted weights are taken apart", (expressions_are_known, inserted_are_read)
    ),
    "folded": Stage("adapters are computed into the weights", (expressions_are_known, adapters_are_gone)),
    "evaluated": Stage(
        "it only evaluates, and its quantized products are on their way to ONNX's",
        (
            nothing_follows_training,
            inputs_are_used,
            tied_weights_have_one_name,
            no_weight_is_written,
        ),
        own_library="adaptc_onnx",
    ),
    "onnx": Stage(
        "operations that ONNX has",
        (nothing_follows_training, tied_weights_have_one_name, nothing_is_written),
        functions=SIZE_FUNCTIONS,
        own_library="adaptc_onnx",
    ),
}
"""What is legal at each stage, besides what is at all: the structure, the weights, shapes and dtypes; see `verify`."""
QUANTIZED = Stage(
    "weights are stored in few bits",
    (weights_are_stored_once,),
    own=frozenset({DEQUANTIZE, LINEAR, EMBEDDING}),
)
"""What is legal besides where weights are quantized, up to the stage `evaluated`."""
STAGES = tuple(TABLE)
"""Their names."""
REWRITTEN = ("traced", "adapted", "factored", "folded")
"""The stages that the passes of a spec start from; the others are those of an emitted program."""


def stages_of(graph: Graph) -> dict[str, Stage]:
    """The stage that a graph is at by its name, and `quantized` where it is that besides.

    A program that adaptc wrote holds quantized operations from the start, and no record of them.
    """
    stage = {graph.stage: TABLE[graph.stage]}
    if graph.stage == "onnx" or not (graph.quantized or _traced_quantized(graph)):
        return stage
    return stage | {"quantized": QUANTIZED}


def _traced_quantized(graph: Graph) -> bool:
    return any(node.target in QUANTIZED.own for node in (graph.as_traced or graph).nodes)
