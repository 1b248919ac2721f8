"""What a plan costs: parameters, memory and operations, from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from adaptc.ir.analysis.matrix_products import flops_of
from adaptc.ir.graph import Graph

BATCH, LENGTH = 1, 128
"""The example that operations are counted for: one row, 128 of everything else that is dynamic."""
EXAMPLE = f"batch {BATCH}, length {LENGTH}"


@dataclass(frozen=True)
class Cost:
    """Sizes in parameters, bytes and floating-point operations (a multiply and an add are two)."""

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
        """Trainable over all parameters of the base."""
        return self.trainable / max(1, self.parameters)


def cost_of(base: Graph, adapted: Graph, factored: Graph, folded: Graph | None) -> Cost:
    """The cost of training and running an adapted model. Activations are not counted.

    Args:
        base: the graph as traced.
        adapted: the same with its adapters.
        factored: as it is trained.
        folded: what is left when it is folded; None where that is the base.
    """
    firsts = {first for name, first in base.aliases.items() if first not in base.buffers}
    weights = {name: base.weights[name] for name in firsts}
    adapters = {name: adapted.weights[name] for name in adapted.adapter_names}
    frozen = sum(adapted.weights[name].nbytes for name in adapted.inserted if name not in adapters)
    total = sum(torch.Size(w.shape).numel() for w in weights.values())
    trainable = sum(torch.Size(w.shape).numel() for w in adapters.values())
    bits = {name for q in adapted.quantized.values() for name in (*q.tensors.values(), q.rest) if name}
    held = sum(w.nbytes for name, w in weights.items() if name in adapted.weights)
    held += sum(adapted.weights[name].nbytes for name in bits)
    added = sum(w.nbytes for w in adapters.values())
    before = flops(base)
    return Cost(
        parameters=total,
        trainable=trainable,
        train_bytes=held
        + frozen
        + 2 * added
        + 8 * trainable,  # weights, gradients and Adam's two float32 states
        run_bytes=held,
        base_flops=before,
        added_flops=flops(factored) - before,
        folded_flops=flops(folded) - before if folded is not None else 0,
        example=EXAMPLE,
    )


def flops(graph: Graph) -> int:
    """Operations of every matrix product and attention of a graph, for the example."""
    sizes = example_sizes(graph)
    return sum(flops_of(node, lambda n: example_shape(n.meta["val"], sizes)) for node in graph.nodes)


def example_sizes(graph: Graph) -> dict[Any, int]:
    """Every symbolic size of the inputs -> its value in the example."""
    found: dict[Any, int] = {}
    specs = {spec.name: spec for spec in graph.inputs}
    for node in graph.placeholders:
        dims = specs[str(node.target)].dims
        for size, dim in zip(node.meta["val"].shape, dims, strict=False):
            if isinstance(size, torch.SymInt):
                found[size.node.expr] = BATCH if dim == "batch" else LENGTH
    return found


def example_shape(value: torch.Tensor, sizes: Mapping[Any, int]) -> list[int]:
    """A value's shape in the example."""

    def plain(size: Any) -> int:
        if not isinstance(size, torch.SymInt):
            return int(size)
        expression = size.node.expr.subs(sizes)
        # Symbols that are left come from values, not from the inputs' sizes.
        return int(expression.subs(dict.fromkeys(expression.free_symbols, LENGTH)))

    return [plain(size) for size in value.shape]
