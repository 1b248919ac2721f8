"""Traces of transformers' models, each made once: most tests compile the same few small models again and again."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from typing import Any

from torch import fx, nn

from adaptc.inputs import InputSpec
from adaptc.tracing.export import export


class Traces:
    """`adaptc.tracing.export.export`, once for all models of transformers' that are traced alike, and for shared ones.

    Attributes:
        fresh: trace anew each time, for tests about tracing itself.
    """

    def __init__(self) -> None:
        self.fresh = False
        self._traces: dict[Hashable, fx.GraphModule] = {}
        self._shared: dict[int, nn.Module] = {}

    def share(self, model: nn.Module) -> None:
        """Trace a model once, which no test changes."""
        self._shared[id(model)] = model

    def export(self, model: nn.Module, inputs: Sequence[InputSpec], training: bool = False) -> fx.GraphModule:
        """The trace of a module, as a copy that may be rewritten."""
        if id(model) in self._shared:
            alike: Hashable = id(model)
        elif is_plain(model):
            alike = traced_alike(model)
        else:
            return export(model, inputs, training)
        key = alike, repr(inputs), training
        if self.fresh or key not in self._traces:
            self._traces[key] = export(model, inputs, training)
        return copied(self._traces[key])


def is_plain(model: nn.Module) -> bool:
    """Whether a model is of transformers' and nobody has changed what it computes."""
    changed = any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
        for module in model.modules()
    )
    return type(model).__module__.startswith("transformers.models.") and not changed


def traced_alike(model: Any) -> Hashable:
    """All of a plain model that a trace depends on: its class, configuration, modules, and tensors with their ties."""
    first: dict[int, str] = {}
    tensors = [
        (name, tuple(tensor.shape), tensor.dtype, first.setdefault(id(tensor), name))
        for name, tensor in model.state_dict(keep_vars=True).items()
    ]
    attention = model.config._attn_implementation
    modules = [(name, type(module), settings(module)) for name, module in model.named_modules()]
    return type(model), model.config.to_json_string(use_diff=False), attention, tuple(modules), tuple(tensors)


def settings(module: nn.Module) -> Hashable:
    """The numbers and words that a module holds, such as the rate of a dropout."""
    held = {
        name: value for name, value in vars(module).items() if isinstance(value, bool | int | float | str)
    }
    return tuple(sorted((name, repr(value)) for name, value in held.items() if name != "training"))


def copied(traced: fx.GraphModule) -> fx.GraphModule:
    """A trace with nodes of its own, and the same tensors."""
    module = fx.GraphModule(traced, copy.deepcopy(traced.graph))
    module.meta = dict(traced.meta)
    return module
