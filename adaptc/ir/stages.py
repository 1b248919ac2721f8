"""The stages of a graph, and what is legal at each: its operations and its laws, in one table.

    traced > adapted > factored         a model; adapters inserted; matrix products split for training
             adapted > folded           adapters computed into the weights
                       any > evaluated  in evaluation mode only, as an exporter wants it
                             evaluated > onnx   operations that ONNX has

A graph with quantized weights is also `quantized`: at its stage, what that row allows is legal too.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload

from adaptc.ir.graph import Graph
from adaptc.ir.laws import (
    Law,
    expressions_have_adaptations,
    inputs_are_used,
    inserted_tensors_are_read,
    no_adapter_is_left,
    no_weight_is_written,
    nothing_follows_training,
    nothing_is_inserted,
    nothing_is_written,
    tied_weights_have_one_name,
    weights_are_stored_once,
)
from adaptc.ir.nodes import is_operator
from adaptc.quantization.operators import DEQUANTIZE, EMBEDDING, LINEAR

ADAPTC_LIBRARIES = frozenset({"adaptc", "adaptc_onnx"})
"""The libraries of adaptc's own operations, each of which is legal at some stages only."""
SIZE_FUNCTIONS: frozenset[Callable[..., Any]] = frozenset(
    [
        getattr(operator, name)
        for name in ("getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pow")
    ]
    + [getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")]
    + [getattr(torch, f"sym_{name}") for name in ("max", "min", "float", "int", "not", "sum", "ite")]
)
"""Python functions on sizes and flags that are legal beside operations on tensors."""


@dataclass(frozen=True)
class Stage:
    """One row of the table.

    Attributes:
        holds: what a graph at this stage is, in words.
        laws: what must hold of the whole graph.
        functions: Python functions that are legal. Registered operations are, but those of adaptc.
        operators: operations of adaptc that are legal.
        library: a library of adaptc all of whose operations are legal; "" for none.
    """

    holds: str
    laws: tuple[Law, ...] = ()
    functions: frozenset[Callable[..., Any]] = SIZE_FUNCTIONS | {getattr}
    operators: frozenset[OpOverload[..., Any]] = frozenset()
    library: str = ""

    def allows(self, target: object) -> bool:
        """Whether an operation is legal at this stage."""
        if not is_operator(target):
            return target in self.functions
        return (
            target.namespace not in ADAPTC_LIBRARIES
            or target in self.operators
            or target.namespace == self.library
        )


STAGE_TABLE: dict[str, Stage] = {
    "traced": Stage("the base as torch.export gives it", (nothing_is_inserted,)),
    "adapted": Stage(
        "adapters are inserted",
        (expressions_have_adaptations, inserted_tensors_are_read),
    ),
    "factored": Stage(
        "matrix products with adapted weights are split",
        (expressions_have_adaptations, inserted_tensors_are_read),
    ),
    "folded": Stage(
        "adapters are computed into the weights",
        (expressions_have_adaptations, no_adapter_is_left),
    ),
    "evaluated": Stage(
        "it only evaluates; quantized matrix products are being replaced by ONNX's",
        (nothing_follows_training, inputs_are_used, tied_weights_have_one_name, no_weight_is_written),
        library="adaptc_onnx",
    ),
    "onnx": Stage(
        "operations that ONNX has",
        (nothing_follows_training, tied_weights_have_one_name, nothing_is_written),
        functions=SIZE_FUNCTIONS,
        library="adaptc_onnx",
    ),
}
"""Stage -> what is legal at it. At every stage structure, weights, shapes and dtypes are checked too: see `verify`."""
QUANTIZED = Stage(
    "weights are stored in few bits",
    (weights_are_stored_once,),
    operators=frozenset({DEQUANTIZE, LINEAR, EMBEDDING}),
)
"""What is also legal where weights are quantized, up to the stage `evaluated`."""
STAGES = tuple(STAGE_TABLE)
"""The names of the stages."""
REWRITTEN = ("traced", "adapted", "factored", "folded")
"""The stages that the passes of a spec start from; the others are those of an emitted program."""


def stages_of(graph: Graph) -> dict[str, Stage]:
    """The rows of the table that hold for a graph.

    A program that adaptc wrote holds quantized operations once it is traced, and no record of quantized weights.

    Returns:
        name -> row: the graph's stage, and `quantized` if it has quantized weights.
    """
    stage = {graph.stage: STAGE_TABLE[graph.stage]}
    if graph.stage == "onnx" or not (graph.quantized or _traced_quantized(graph)):
        return stage
    return stage | {"quantized": QUANTIZED}


def _traced_quantized(graph: Graph) -> bool:
    return any(node.target in QUANTIZED.operators for node in (graph.as_traced or graph).nodes)
