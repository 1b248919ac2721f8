"""Traces of models, each made once: most tests compile the same few small models again and again."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import fx, nn

from adaptc.compiler.trainable import base_of_both_modes
from adaptc.inputs import InputSpec
from adaptc.ir.graph import Graph
from adaptc.tracing.export import export

ORIGIN = ("_name_or_path", "name_or_path", "architectures", "quantization_config", "transformers_version")
"""The keys of a configuration, and of a model, that say where it comes from."""

IN_BOTH_MODES = "in_both_modes"
"""The attribute of a traced graph under which tests keep it as it reads `training`."""


class Traces:
    """`adaptc.tracing.export.export`, once for all plain models that are traced alike, and for shared ones.

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

    def base_of_both_modes(self, base: Graph) -> Graph:
        """`adaptc.compiler.trainable.base_of_both_modes`, once for all that is compiled on one traced graph."""
        held = vars(base)
        if self.fresh or IN_BOTH_MODES not in held:
            held[IN_BOTH_MODES] = base_of_both_modes(base)
        return held[IN_BOTH_MODES]


def is_plain(model: nn.Module) -> bool:
    """Whether all that a trace depends on can be told.

    Nobody has changed what the model computes, and its parts are transformers' or hold plain values.
    """
    changed = any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
        for module in model.modules()
    )
    by_transformers = type(model).__module__.startswith("transformers.models.")
    return not changed and (by_transformers or all(holds_plain_values(module) for module in model.modules()))


def holds_plain_values(module: nn.Module) -> bool:
    """Whether a module of torch's or of a test's holds numbers and words beside its tensors and its parts."""
    of_tests = type(module).__module__.startswith(("torch.nn.modules.", "tests."))
    return of_tests and all(is_plain_value(value) for value in attributes(module).values())


def is_plain_value(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(is_plain_value(item) for item in value)
    is_function = callable(value) and (getattr(value, "__module__", None) or "").startswith(
        ("torch.nn.", "tests.")
    )
    return value is None or is_function or isinstance(value, bool | int | float | str | torch.dtype)


def attributes(module: nn.Module) -> dict[str, object]:
    """What a module holds that not every module holds."""
    common = vars(nn.Module())
    return {name: value for name, value in vars(module).items() if name not in common}


def traced_alike(model: Any) -> Hashable:
    """All of a plain model that a trace depends on: its class, configuration, modules, and tensors with their ties."""
    first: dict[int, str] = {}
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    tensors = [(name, *described(tensor), first.setdefault(id(tensor), name)) for name, tensor in named]
    modules = [(name, type(module), settings(module)) for name, module in model.named_modules()]
    return type(model), configuration(model), tuple(modules), tuple(tensors)


def described(tensor: torch.Tensor) -> tuple[Hashable, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, str(tensor.device), tensor.requires_grad


def configuration(model: Any) -> Hashable:
    """What a trace depends on in a configuration: not where it was read from, nor how its weights were stored."""
    config = getattr(model, "config", None)
    return config and (repr(without_origin(config.to_dict())), config._attn_implementation)


def without_origin(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: without_origin(item) for key, item in value.items() if key not in ORIGIN}


def settings(module: nn.Module) -> Hashable:
    """The plain values that a module holds, such as the rate of a dropout."""
    held = without_origin(attributes(module))
    plain = {name: value for name, value in held.items() if is_plain_value(value)}
    return tuple((name, value if callable(value) else repr(value)) for name, value in sorted(plain.items()))


def copied(traced: fx.GraphModule) -> fx.GraphModule:
    """A trace with nodes of its own, and the same tensors."""
    module = fx.GraphModule(traced, copy.deepcopy(traced.graph))
    module.meta = dict(traced.meta)
    return module
