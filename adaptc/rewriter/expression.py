"""Weight expressions: traced to ATen, spliced in front of a site, and evaluated when folded."""

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
"""Numbers of a folded weight whose rounding is measured at once: as many as torch computes with on one thread."""


def trace_expression(
    function: Callable[..., torch.Tensor],
    operands: Sequence[Any],
    theta: Mapping[str, Any],
    whole: bool = False,
) -> fx.Graph:
    """Trace `function(*operands, **theta)` on fake tensors; its inputs are the operands, then `theta` in order.

    With `whole` operations stay as the model would run them, such as a linear layer on a batch. What it makes is made
    where its first input is.
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
    mark: Mapping[str, Any],
    before: fx.Node | None = None,
) -> fx.Node:
    """Copy a traced expression in front of `like`, or of another node; gives the node of its result.

    Args:
        graph: the host.
        traced: the expression.
        operands: the nodes of its inputs.
        like: the first user of what it changes; new nodes take its origin.
        mark: what is kept in the meta of each new node: its adaptation, or the weight it stands for.
        before: where it stands, if not in front of `like`.
    """
    inputs = [n for n in traced.nodes if n.op == "placeholder"]
    mapping = dict(zip(inputs, operands, strict=True))
    known = set(graph.module.graph.nodes)
    with graph.module.graph.inserting_before(before or like):
        result = graph.module.graph.graph_copy(traced, mapping)
    for node in graph.module.graph.nodes:
        if node not in known:
            node.meta = {"val": node.meta.get("val"), **mark}
            node.meta |= {k: v for k, v in like.meta.items() if k in PROVENANCE}
    assert isinstance(result, fx.Node)
    return result


@dataclass(frozen=True)
class Expression:
    """A subgraph of weights only, cut out of its graph so that it can be evaluated later.

    Attributes:
        nodes: its operations in order of execution.
        result: the node whose value it gives.
        leaves: weight name -> weight, as bound when it was cut out.
    """

    nodes: tuple[fx.Node, ...]
    result: fx.Node
    leaves: Mapping[str, Weight]

    def evaluate(self) -> torch.Tensor:
        """Compute it: in float64 for float32 weights, in float32 for narrower ones."""
        wide = (
            torch.float64
            if self.result.meta["val"].dtype in (torch.float32, torch.float64)
            else torch.float32
        )

        def widened(dtype: torch.dtype) -> torch.dtype:  # of a constant that the expression makes
            return wide if dtype.is_floating_point else dtype

        last = {operand: node for node in self.nodes for operand in (node, *node.all_input_nodes)}
        values: dict[fx.Node, Any] = {}
        with torch.no_grad():
            for node in self.nodes:
                if node.op == "get_attr":
                    tensor = self.leaves[str(node.target)].exact()
                    narrow = all(
                        user.target is DEQUANTIZE for user in node.users
                    )  # stored numbers stay as they are
                    values[node] = tensor if narrow or not tensor.dtype.is_floating_point else tensor.to(wide)
                    del tensor
                else:
                    args, kwargs = map_arg((node.args, dict(node.kwargs)), values.__getitem__)  # type: ignore[arg-type]
                    args, kwargs = pytree.tree_map_only(torch.dtype, widened, (args, kwargs))
                    values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
                    del args, kwargs
                for operand in (node, *node.all_input_nodes):
                    if last[operand] is node and operand is not self.result:
                        values.pop(operand, None)
        return values[self.result]


@dataclass(eq=False)
class FoldedWeight(Weight):
    """A folded weight: its expression, evaluated wide and rounded once to the storage dtype.

    `rounding` is what rounding cost when it was last loaded: the largest change over the largest value.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    expression: Expression
    rounding: float | None = None

    def load(self) -> torch.Tensor:
        """Evaluate, round, and remember what rounding cost."""
        exact = self.expression.evaluate()
        rounded = exact.to(self.dtype).contiguous()
        self.rounding = _change(exact, rounded) / max(_largest(exact), 1e-30)
        return rounded


def _change(exact: torch.Tensor, rounded: torch.Tensor) -> float:
    """The largest difference, a few rows at a time: memory holds no third wide tensor."""
    if not exact.numel():
        return 0.0
    rows = max(1, PIECE * len(torch.atleast_1d(exact)) // exact.numel())
    pieces = [torch.atleast_1d(tensor).split(rows) for tensor in (exact, rounded)]
    return max(_largest(a - b) for a, b in zip(*pieces, strict=True))


def _largest(tensor: torch.Tensor) -> float:
    low, high = torch.aminmax(tensor) if tensor.numel() else (0.0, 0.0)
    return max(-float(low), float(high))


def extract_expression(graph: Graph, result: fx.Node) -> Expression:
    """Cut the expression of a node out of the graph.

    Raises:
        ValueError: the node depends on an input, so it is no expression of weights only.
    """
    order: dict[fx.Node, None] = {}

    def visit(node: fx.Node) -> None:
        if node in order:
            return
        if node.op == "placeholder" or node.target == "training":
            raise ValueError(f"{result.name} depends on {node.name}, which is no weight")
        for operand in node.all_input_nodes:
            visit(operand)
        order[node] = None

    visit(result)
    # A copy, since the graph's own nodes are erased when it is folded.
    copied = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in order:
        mapping[node] = copied.node_copy(node, mapping.__getitem__)
    leaves = {str(n.target): graph.weights[str(n.target)] for n in order if n.op == "get_attr"}
    return Expression(tuple(mapping.values()), mapping[result], leaves)
