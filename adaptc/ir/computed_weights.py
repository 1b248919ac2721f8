"""Layers whose weight is computed from other parameters each time they run, so that no stored weight can be adapted."""

# The hooks of torch's older functions have no public names.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any, cast

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from adaptc.ir.graph import Graph
from adaptc.ir.nodes import module_of, source_of

LAYERS: tuple[tuple[str, type[nn.Module]], ...] = (
    ("linear", nn.Linear),
    ("conv", nn.modules.conv._ConvNd),
    ("embedding", nn.Embedding),
)
"""Kind of site -> the class of the layers whose `weight` is one."""
HOOKS: tuple[tuple[type[Any], str, str], ...] = (
    (WeightNorm, "name", "torch.nn.utils.remove_weight_norm(model.{module})"),
    (SpectralNorm, "name", "torch.nn.utils.remove_spectral_norm(model.{module})"),
    (BasePruningMethod, "_tensor_name", "torch.nn.utils.prune.remove(model.{module}, 'weight')"),
)
"""Class of a hook that computes a weight, its attribute that names the weight, and what puts the weight back."""


def computed_weights(graph: Graph, kinds: Collection[str], wanted: Callable[[str], bool]) -> list[str]:
    """A message for every layer of some kinds whose weight is computed: where, from what, and what stores it again.

    Args:
        graph: the graph; a saved program, which has no layers, gives none.
        kinds: kinds of sites.
        wanted: whether a layer counts, by its name.
    """
    model = graph.source.model
    if model is None:
        return []
    messages: list[str] = []
    classes = tuple(cls for kind, cls in LAYERS if kind in kinds)
    for name, layer in cast("Iterable[tuple[str, nn.Module]]", model.named_modules()):
        mend = _mend(layer, name) if isinstance(layer, classes) and wanted(name) else None
        if mend is not None:
            parts = ", ".join(part for part, _ in layer.named_parameters() if "weight" in part)
            lines = (source_of(node) for node in graph.nodes if module_of(node)[0] == name)
            where = next((line for line in lines if line), "on no path to the output")
            messages.append(
                f"{name} ({type(layer).__name__}, {where}) has no stored weight: it computes one from {parts} each "
                f"time it runs; call {mend} before the model is compiled"
            )
    return messages


def _mend(layer: nn.Module, name: str) -> str | None:
    """What makes a layer's weight a parameter again; None where it is one."""
    if parametrize.is_parametrized(layer, "weight"):
        return f"torch.nn.utils.parametrize.remove_parametrizations(model.{name}, 'weight')"
    for hook in cast(Any, layer)._forward_pre_hooks.values():
        for cls, attribute, mend in HOOKS:
            if isinstance(hook, cls) and getattr(hook, attribute) == "weight":
                return mend.format(module=name)
    return None
