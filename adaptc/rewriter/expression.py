"""Weight expressions: traced to ATen operations, spliced into a graph, extracted from it, evaluated when folded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from adaptc.ir.graph import Graph
from adaptc.ir.nodes import PROVENANCE, follow_device
from adaptc.quantization.operators import DEQUANTIZE
from adaptc.weights import Weight

PIECE = 2**15
"""How many numbers of a folded weight have their rounding measured at once: torch computes as many on one thread."""


def trace_expression(
    function: Callable[..., torch.Tensor],
    operands: Sequence[object],
    theta: Mapping[str, object],
    whole: bool = False,
) -> fx.Graph:
    """Trace `function(*operands, **theta)` on fake tensors.

    Args:
        function: the expression.
        operands: fake tensors.
        theta: its other arguments by name, fake tensors too.
        whole: leave operations as the model would run them, such as a linear layer on a batch.

    Returns:
        A graph whose inputs are the operands, then `theta` in order. Tensors that the function creates are created on
        the device of the first input.
    """
    names, count = list(theta), len(operands)

    def positional(*values: torch.Tensor) -> torch.Tensor:
        return function(*values[:count], **dict(zip(names, values[count:], strict=True)))

    graph = make_fx(positional, pre_dispatch=whole)(*operands, *theta.values()).graph
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    follow_device(graph, inputs[0], inputs[-1])
    return graph


def splice(
    graph: Graph,
    traced: fx.Graph,
    operands: Sequence[fx.Node],
    like: fx.Node,
    mark: Mapping[str, object],
    before: fx.Node | None = None,
) -> fx.Node:
    """Copy a traced expression into a graph; gives the node of its result.

    Args:
        graph: the host.
        traced: the expression.
        operands: the nodes of its inputs.
        like: the first user of what it changes; new nodes take its origin, and are inserted in front of it.
        mark: goes into the meta of each new node: its adaptation, or the quantized weight it belongs to.
        before: the node to insert in front of, if not `like`.
    """
    inputs = [n for n in traced.nodes if n.op == "placeholder"]
    mapping = dict(zip(inputs, operands, strict=True))
    existing = set(graph.module.graph.nodes)
    with graph.module.graph.inserting_before(before or like):
        result = graph.module.graph.graph_copy(traced, mapping)
    for node in graph.module.graph.nodes:
        if node not in existing:
            node.meta = {"val": node.meta.get("val"), **mark}
            node.meta |= {k: v for k, v in like.meta.items() if k in PROVENANCE}
    assert isinstance(result, fx.Node)
    return result


SMALLEST = 1e-30
"""The smallest divisor of a rounding error, for weights of zeros."""


@dataclass(frozen=True)
class Expression:
    """A subgraph that depends on weights alone, extracted from its graph so that it can be evaluated later.

    Attributes:
        nodes: its operations in order of execution.
        result: the node whose value it gives.
        leaves: weight name -> weight, as bound when the expression was extracted.
    """

    nodes: tuple[fx.Node, ...]
    result: fx.Node
    leaves: Mapping[str, Weight]

    def evaluate(self) -> torch.Tensor:
        """The value, computed in float64 for float32 weights, in float32 for narrower ones."""
        wide = (
            torch.float64
            if self.result.meta["val"].dtype in (torch.float32, torch.float64)
            else torch.float32
        )

        def widened(dtype: torch.dtype) -> torch.dtype:
            """The dtype that an operation is given, such as that of a constant, made wide."""
            return wide if dtype.is_floating_point else dtype

        last = {operand: node for node in self.nodes for operand in (node, *node.all_input_nodes)}
        values: dict[fx.Node, Any] = {}
        with torch.no_grad():
            for node in self.nodes:
                if node.op == "get_attr":
                    tensor = self.leaves[str(node.target)].exact()
                    # What is stored of a quantized weight is dequantized as it is.
                    stored = all(user.target is DEQUANTIZE for user in node.users)
                    values[node] = tensor if stored or not tensor.dtype.is_floating_point else tensor.to(wide)
                    del tensor
                else:
                    target: Any = node.target
                    arguments: Any = (node.args, dict(node.kwargs))
                    arguments = map_arg(arguments, values.__getitem__)
                    args, kwargs = pytree.tree_map_only(torch.dtype, widened, arguments)
                    del arguments
                    values[node] = target(*args, **kwargs)
                    del args, kwargs
                for operand in (node, *node.all_input_nodes):
                    if last[operand] is node and operand is not self.result:
                        values.pop(operand, None)
        return values[self.result]


@dataclass(eq=False)
class FoldedWeight(Weight):
    """A folded weight: its expression, evaluated wide and rounded once to the storage dtype.

    `rounding` is the error of the last rounding, the largest change over the largest value; None before it is loaded.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    expression: Expression
    rounding: float | None = None

    def load(self) -> torch.Tensor:
        """Evaluate, round, and record the rounding error."""
        exact = self.expression.evaluate()
        rounded = exact.to(self.dtype).contiguous()
        self.rounding = _change(exact, rounded) / max(_largest(exact), SMALLEST)
        return rounded


def _change(exact: torch.Tensor, rounded: torch.Tensor) -> float:
    """The largest difference between two tensors, a few rows at a time, so that memory holds no third wide tensor."""
    if not exact.numel():
        return 0.0
    wide, narrow = (tensor if tensor.dim() else tensor.reshape(1) for tensor in (exact, rounded))
    rows = max(1, PIECE * len(wide) // wide.numel())
    return max(
        _largest(a - b) for a, b in zip(torch.split(wide, rows), torch.split(narrow, rows), strict=True)
    )


def _largest(tensor: torch.Tensor) -> float:
    """The largest absolute value; 0 for a tensor without numbers."""
    low, high = torch.aminmax(tensor) if tensor.numel() else (0.0, 0.0)
    return max(-float(low), float(high))


def extract_expression(graph: Graph, result: fx.Node) -> Expression:
    """The expression of a node, as a copy that stays valid when the graph is rewritten.

    Raises:
        ValueError: the node depends on an input of the model, or on its mode, so not on weights alone.
    """
    order: dict[fx.Node, None] = {}

    def visit(node: fx.Node) -> None:
        if node in order:
            return
        if node.op == "placeholder" or node.target == "training":
            raise ValueError(f"{result.name} depends on {node.name}, which is not a weight")
        for operand in node.all_input_nodes:
            visit(operand)
        order[node] = None

    visit(result)
    copied = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in order:
        mapping[node] = copied.node_copy(node, mapping.__getitem__)
    leaves = {str(n.target): graph.weights[str(n.target)] for n in order if n.op == "get_attr"}
    return Expression(tuple(mapping.values()), mapping[result], leaves)
