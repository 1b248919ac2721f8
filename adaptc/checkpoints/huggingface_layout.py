"""The layout of a Hugging Face checkpoint as `save_pretrained` writes it: which tensors it holds, under which names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from adaptc.checkpoints.huggingface_weights import first_names
from adaptc.optional import optional
from adaptc.weights import Deferred, Weight


def saved_names(model: nn.Module, aliases: Mapping[str, str]) -> list[str]:
    """The names that are written, as `save_pretrained` chooses them: of tied ones, the one that others are tied to.

    Args:
        model: a model of transformers; it says which names are tied, and which are never written.
        aliases: name -> the first name of the same tensor. A name that the model ties, but that has a tensor of
            its own here, is written too.
    """
    tied = getattr(model, "all_tied_weights_keys", {})
    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    names = [name for name in model.state_dict() if name not in ignored]
    firsts = first_names(model)
    name_of: dict[tuple[str, str], str] = {}
    for name in sorted(names, key=lambda name: name in tied):
        name_of.setdefault((firsts[name], aliases[name]), name)
    written = set(name_of.values())
    return [name for name in names if name in written]


def saved_weights(model: nn.Module, weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """The weights as `save_pretrained` writes them, where a checkpoint's layout is not the model's own.

    Some models fuse tensors as they are loaded, such as the experts of Mixtral. How transformers splits them again is
    traced on shapes, and computed when a tensor is loaded.

    Args:
        model: a model of transformers; it says which conversions there are.
        weights: by the model's own names.

    Returns:
        Key in the checkpoint -> weight.
    """
    conversions = optional("transformers.core_model_loading")
    names: list[str] = []

    def revert(*tensors: torch.Tensor) -> list[torch.Tensor]:
        state = cast(
            dict[str, torch.Tensor],
            conversions.revert_weight_conversion(model, dict(zip(weights, tensors, strict=True))),
        )
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
    """Operations on weights, computed for one result at a time.

    Results of the same weights follow one another. So intermediate values are cached until a result of other weights
    is computed.

    Attributes:
        sources: node of the traced operations -> the weight that it reads.
        values: the cached values.
        cached_sources: the nodes of the weights that the cached values were computed from.
    """

    sources: Mapping[fx.Node, Weight]
    values: dict[fx.Node, Any] = field(default_factory=dict[fx.Node, Any])
    cached_sources: frozenset[fx.Node] = frozenset()

    def weight(self, node: fx.Node) -> Weight:
        """The result at a node as a weight; a weight that is not converted stays itself."""
        if node in self.sources:
            return self.sources[node]
        value = node.meta["val"]
        return Deferred(tuple(value.shape), value.dtype, lambda: self._result(node))

    def _result(self, node: fx.Node) -> torch.Tensor:
        sources = self._sources_of(node)
        if sources != self.cached_sources:
            self.values.clear()
            self.cached_sources = sources
        return self._value(node)

    def _sources_of(self, node: fx.Node) -> frozenset[fx.Node]:
        if node in self.sources:
            return frozenset({node})
        return frozenset[fx.Node]().union(*(self._sources_of(operand) for operand in node.all_input_nodes))

    def _value(self, node: fx.Node) -> Any:
        if node not in self.values and node in self.sources:
            self.values[node] = self.sources[node].load()
        elif node not in self.values:
            operands = map_arg(cast(Any, (node.args, dict(node.kwargs))), self._value)
            args, kwargs = cast(tuple[tuple[Any, ...], dict[str, Any]], operands)
            self.values[node] = cast(Callable[..., Any], node.target)(*args, **kwargs)
        return self.values[node]
