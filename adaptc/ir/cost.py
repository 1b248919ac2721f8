"""The cost of an adapted model: parameters, memory and floating-point operations, from shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from adaptc.ir.analysis.matrix_products import flops_of
from adaptc.ir.graph import Graph
from adaptc.ir.nodes import size_expression

BATCH, LENGTH = 1, 128
"""The sizes that operations are counted for: a batch of one row, and 128 for every other dynamic dimension."""
EXAMPLE = f"batch {BATCH}, length {LENGTH}"
"""These sizes as text."""


@dataclass(frozen=True)
class Cost:
    """The cost of an adapted model. A multiplication and an addition are two floating-point operations (FLOPs).

    Attributes:
        parameters: the number of parameters of the base.
        trainable: the number of parameters that are trained.
        train_bytes: memory of training: weights, gradients and Adam's two float32 states; no activations.
        run_bytes: memory of the base's weights as they are stored.
        base_flops: FLOPs of the base.
        added_flops: FLOPs that the adapters add in training.
        folded_flops: FLOPs that the adapters add in the folded model.
        example: the sizes that FLOPs are counted for.
    """

    parameters: int
    trainable: int
    train_bytes: int
    run_bytes: int
    base_flops: int
    added_flops: int
    folded_flops: int
    example: str

    @property
    def share(self) -> float:
        """The number of trained parameters over that of the base's."""
        return self.trainable / max(1, self.parameters)

    def __str__(self) -> str:
        """Parameters, memory and operations, a line each."""
        added = f"{self.added_flops:,} ({self.added_flops / max(1, self.base_flops):.2%})"
        folded = f"{self.folded_flops:,} ({self.folded_flops / max(1, self.base_flops):.2%})"
        return (
            f"parameters  {self.parameters:,} in the base, {self.trainable:,} trainable ({self.share:.3%})\n"
            f"memory      {shown_bytes(self.run_bytes)} to run, {shown_bytes(self.train_bytes)} to train "
            "(weights, gradients, Adam; no activations)\n"
            f"operations  {self.base_flops:,} for {self.example} (matrix products, convolutions, attention); "
            f"live adapters add {added}, folded ones {folded if self.folded_flops else 'none'}"
        )


def shown_bytes(count: float) -> str:
    """A size in bytes with three digits and a unit: `1.23 MB`, a million bytes each."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def cost_of(base: Graph, adapted: Graph, factored: Graph, folded: Graph | None) -> Cost:
    """The cost of training and running an adapted model. Activations are not counted.

    Args:
        base: the graph as traced.
        adapted: the graph with its adapters.
        factored: the graph as it is trained.
        folded: the folded graph; None if it has the operations of the base.
    """
    firsts = {first for first in base.aliases.values() if first not in base.buffers}
    weights = {name: base.weights[name] for name in firsts}
    adapters = {name: adapted.weights[name] for name in adapted.adapter_names}
    frozen = sum(adapted.weights[name].nbytes for name in adapted.inserted if name not in adapters)
    total = sum(torch.Size(w.shape).numel() for w in weights.values())
    trainable = sum(torch.Size(w.shape).numel() for w in adapters.values())
    quantized = {name for q in adapted.quantized.values() for name in (*q.tensors.values(), q.rest) if name}
    held = sum(w.nbytes for name, w in weights.items() if name in adapted.weights)
    held += sum(adapted.weights[name].nbytes for name in quantized)
    added = sum(w.nbytes for w in adapters.values())
    base_flops = flops(base)
    return Cost(
        parameters=total,
        trainable=trainable,
        train_bytes=held + frozen + 2 * added + 8 * trainable,
        run_bytes=held,
        base_flops=base_flops,
        added_flops=flops(factored) - base_flops,
        folded_flops=flops(folded) - base_flops if folded is not None else 0,
        example=EXAMPLE,
    )


def flops(graph: Graph) -> int:
    """FLOPs of all matrix products and attentions of a graph, for the example sizes."""
    shape = example_shapes(graph)
    return sum(flops_of(node, lambda n: shape(n.meta["val"])) for node in graph.nodes)


def example_shapes(graph: Graph) -> Callable[[torch.Tensor], list[int]]:
    """Gives the shape of any value of a graph in the example, in numbers."""
    number = cache(partial(_number, _example_sizes(graph)))  # the values of a graph have few sizes
    return lambda value: [number(size_expression(size)) for size in value.shape]


def _example_sizes(graph: Graph) -> dict[Any, int]:
    """Symbol of a dynamic size of the inputs -> its number in the example."""
    numbers: dict[Any, int] = {}
    specs = {spec.name: spec for spec in graph.inputs}
    for node in graph.placeholders:
        dims = specs[str(node.target)].dims
        for size, dim in zip(node.meta["val"].shape, dims, strict=False):
            if isinstance(size, torch.SymInt):
                numbers[size_expression(size)] = BATCH if dim == "batch" else LENGTH
    return numbers


def _number(numbers: Mapping[object, int], size: Any) -> int:
    """A size in the example; symbols that no input gives depend on values, and count as a length."""
    expression = size.subs(numbers)
    return int(expression.subs(dict.fromkeys(expression.free_symbols, LENGTH)))
