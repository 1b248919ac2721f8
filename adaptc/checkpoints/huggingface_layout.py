"""The layout of a Hugging Face checkpoint: which tensors stand in it, under which names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from adaptc.checkpoints.huggingface import first_names
from adaptc.weights import Deferred, Weight


def stored_names(model: nn.Module, aliases: Mapping[str, str]) -> list[str]:
    """The names that are written, as `save_pretrained` chooses them: of tied ones, the one that others are tied to.

    Args:
        model: says what transformers ties, and what it never writes.
        aliases: name -> the first name of the same tensor; a name that the model ties, but that has a tensor of
            its own, is written too.
    """
    tied = getattr(model, "all_tied_weights_keys", {})
    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    names = [name for name in model.state_dict() if name not in ignored]
    firsts = first_names(model)
    kept: dict[tuple[str, str], str] = {}
    for name in sorted(names, key=lambda name: name in tied):
        kept.setdefault((firsts[name], aliases[name]), name)
    chosen = set(kept.values())
    return [name for name in names if name in chosen]


def as_stored(model: nn.Module, weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """The weights as `save_pretrained` writes them, where a checkpoint's layout is not the model's own.

    Some models fuse on loading what is apart in their checkpoints, such as the experts of Mixtral. What
    transformers does to take them apart again is traced on shapes, and done when a tensor is asked for.

    Args:
        model: says which conversions there are.
        weights: by the model's own names.
    """
    from transformers.core_model_loading import revert_weight_conversion

    names: list[str] = []

    def revert(*tensors: torch.Tensor) -> list[torch.Tensor]:
        state = revert_weight_conversion(model, dict(zip(weights, tensors, strict=True)))  # type: ignore[arg-type]
        names.extend(state)
        return list(state.values())

    shapes = [torch.empty(weight.shape, dtype=weight.dtype, device="meta") for weight in weights.values()]
    graph = make_fx(revert, tracing_mode="fake")(*shapes).graph
    sources = dict(zip((n for n in graph.nodes if n.op == "placeholder"), weights.values(), strict=True))
    results: Any = next(node for node in graph.nodes if node.op == "output").args[0]
    conversion = _Conversion(sources)
    return {name: conversion.weight(node) for name, node in zip(names, results, strict=True)}


@dataclass
class _Conversion:
    """Operations on weights, done for one result at a time.

    Results of the same weights follow one another, so that what they share is kept until others are asked for.
    """

    sources: Mapping[fx.Node, Weight]
    held: dict[fx.Node, Any] = field(default_factory=dict)
    among: frozenset[fx.Node] = frozenset()
    """The weights that what is held was made from."""

    def weight(self, node: fx.Node) -> Weight:
        """The result as a weight; a weight that nothing is done to stays itself."""
        if node in self.sources:
            return self.sources[node]
        value = node.meta["val"]
        return Deferred(tuple(value.shape), value.dtype, lambda: self._result(node))

    def _result(self, node: fx.Node) -> torch.Tensor:
        needed = self._needed(node)
        if needed != self.among:
            self.held.clear()
            self.among = needed
        return self._value(node)

    def _needed(self, node: fx.Node) -> frozenset[fx.Node]:
        if node in self.sources:
            return frozenset({node})
        return frozenset().union(*(self._needed(operand) for operand in node.all_input_nodes))

    def _value(self, node: fx.Node) -> Any:
        if node not in self.held and node in self.sources:
            self.held[node] = self.sources[node].load()
        elif node not in self.held:
            args, kwargs = map_arg((node.args, dict(node.kwargs)), self._value)  # type: ignore[arg-type]
            self.held[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return self.held[node]
