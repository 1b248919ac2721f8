"""A graph with a cache, fed in chunks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from adaptc.ir.graph import Graph
from adaptc.ir.module import bind
from adaptc.rewriter.cache.past import PAST, TOTAL


def empty_past(graph: Graph, batch: int) -> dict[str, torch.Tensor]:
    """The keys and values of no tokens."""
    return {
        spec.name: torch.zeros(
            [batch, int(spec.dims[1]), 0, int(spec.dims[3])], dtype=getattr(torch, spec.dtype)
        )
        for spec in graph.inputs
        if PAST in spec.dims
    }


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
    module, past = bind(graph).eval(), empty_past(graph, len(tensors[ids]))
    new = next(spec for spec in graph.inputs if spec.name == ids).dims[1]
    outputs, start = list[torch.Tensor](), 0
    for count in chunks:
        end = start + count
        given: dict[str, torch.Tensor] = dict(past)
        for spec in graph.inputs:
            if spec.name in past:
                continue
            value, axes = tensors[spec.name], dict(zip(spec.dims, range(len(spec.dims)), strict=True))
            if TOTAL in axes:
                value = value.narrow(axes[TOTAL], 0, end)
            elif new in axes:
                value = value.narrow(axes[new], start, count)
            given[spec.name] = value
        with torch.no_grad():
            results: Any = module(*(given[spec.name] for spec in graph.inputs))
        named = dict(
            zip(graph.outputs, results.values() if isinstance(results, dict) else results, strict=True)
        )
        past = {
            n.replace("present", "past_key_values"): v for n, v in named.items() if n.startswith("present.")
        }
        outputs.append(next(iter(named.values())))
        start = end
    return torch.cat(outputs, 1)
