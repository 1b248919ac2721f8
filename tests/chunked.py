"""A graph with a cache, fed in chunks as proofs feed programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from adaptc.compiler.proof.cached_runner import CachedRunner
from adaptc.compiler.proof.runners import BatchRunner
from adaptc.ir.graph import Graph
from adaptc.ir.module import bind
from adaptc.ir.nodes import size_expression
from adaptc.rewriter.cache.signature import CacheSignature


def signature_of(graph: Graph, ids: str) -> CacheSignature:
    """What a graph with a cache takes and gives; of outputs, only which axis has the new tokens is told."""
    new = next(str(spec.dims[1]) for spec in graph.inputs if spec.name == ids)
    count = next(
        size_expression(node.meta["val"].shape[1])
        for node, spec in zip(graph.placeholders, graph.inputs, strict=True)
        if spec.name == ids
    )
    results: Any = next(node for node in graph.nodes if node.op == "output").args[0]
    outputs = {
        name: tuple(new if size_expression(size) == count else size for size in node.meta["val"].shape)
        for name, node in zip(graph.outputs, results, strict=True)
        if isinstance(node, fx.Node)
    }
    return CacheSignature(graph.inputs, outputs, new)


def chunked(
    graph: Graph, tensors: Mapping[str, torch.Tensor], ids: str, chunks: Sequence[int]
) -> torch.Tensor:
    """The first output for all tokens, some at a time.

    Args:
        graph: it has a cache.
        tensors: the inputs for all tokens.
        ids: the input of token ids.
        chunks: how many tokens each call gets.
    """
    module = bind(graph).eval()

    def call(step: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        with torch.no_grad():  # keys and values have names that are no arguments
            return pytree.tree_leaves(module(*(step[spec.name] for spec in graph.inputs)))

    given = {spec.name: tensors[spec.name] for spec in graph.inputs if spec.name in tensors}
    run = CachedRunner(BatchRunner(call), signature_of(graph, ids), lambda _: chunks).on({"": given})
    outcome = run.outcomes[""]
    if isinstance(outcome, Exception):
        raise outcome
    return outcome[0]
