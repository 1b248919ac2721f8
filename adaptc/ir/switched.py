"""A module with several graphs over one set of weights: one of them is active."""

# torch has no public way to ask which buffers are no part of the state dict.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import fx, nn

from adaptc.errors import AdaptcError, unknown
from adaptc.ir.counted import COUNTED, let_count
from adaptc.ir.module import Segment
from adaptc.ir.nodes import set_tensor

ALTERNATIVES = "adaptc.alternatives"
"""The key of a module's `meta` that holds its graphs, so that copies of the module have them."""


class SwitchedModule(fx.GraphModule):
    """A compiled module with alternatives: `set_adapter("alice")` makes one active, `set_adapter(None)` none.

    Every alternative's tensors are in the state dict, under names of their own. Gradients flow to those of the active
    one, and of what is always on.
    """

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the alternatives."""
        return tuple(name for name in self._alternatives if name is not None)

    @property
    def active(self) -> str | None:
        """The name of the active alternative; None where none is."""
        return self.meta["adaptc.active"]

    def meta_of(self, name: str | None) -> Mapping[str, Any]:
        """What the module's `meta` holds while this alternative is active."""
        return self._alternatives[name][1]

    def set_adapter(self, name: str | None) -> None:
        """Make an alternative active; None is the model with what is always on alone. No tensor is touched.

        Raises:
            AdaptcError: there is no alternative of this name.
        """
        if name not in self._alternatives:
            raise AdaptcError(unknown("adapter", name, self.adapters))
        graph, record = self._alternatives[name]
        self.graph = graph
        self.meta |= {"adaptc.active": name, **record}

    @property
    def _alternatives(self) -> Mapping[str | None, tuple[fx.Graph, Mapping[str, Any]]]:
        """Name -> its graph, and what the module's `meta` holds while it is active."""
        return self.meta[ALTERNATIVES]

    def __deepcopy__(self, memo: dict[int, Any]) -> SwitchedModule:
        """A copy with the tensors of every alternative: torch copies those that the active graph reads."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's own, from copying its pytree specs
            copied = cast("SwitchedModule", super().__deepcopy__(memo))
        _share(copied, self, memo)
        copied.set_adapter(self.active)
        return copied.train(self.training)


def switched(base: fx.GraphModule, alternatives: Mapping[str, fx.GraphModule]) -> SwitchedModule:
    """One module of several: the graph and `meta` of each, and the tensors of all, those of `base` first.

    Args:
        base: the module without an alternative.
        alternatives: the modules with one of them.
    """
    module = SwitchedModule(nn.Module(), fx.Graph())
    graphs: dict[str | None, tuple[fx.Graph, Mapping[str, Any]]] = {}
    for name, other in {None: base, **alternatives}.items():
        _share(module, other, None)
        for child, part in other.named_children():
            if isinstance(part, Segment):
                module.add_module(child, part)
        graphs[name] = (other.graph, dict(other.meta))
    module.meta[ALTERNATIVES] = graphs
    let_count(module, base.meta.get(COUNTED, {}))
    module.set_adapter(None)
    return module


def _share(target: nn.Module, source: nn.Module, memo: dict[int, Any] | None) -> None:
    """Give a module the parameters and buffers of another that it lacks.

    Args:
        target: changed in place.
        source: the other one.
        memo: of a deep copy, which copies of its tensors are taken from; None to take the tensors themselves.
    """
    present = {n for n, _ in (*target.named_parameters(remove_duplicate=False), *target.named_buffers())}
    untyped: Any = source
    parts: dict[str, nn.Module] = dict(untyped.named_modules())
    for prefix, part in parts.items():
        tensors: dict[str, torch.Tensor | None] = {**part._parameters, **part._buffers}
        for leaf, tensor in tensors.items():
            name = f"{prefix}.{leaf}" if prefix else leaf
            if tensor is not None and name not in present:
                value = tensor if memo is None else copy.deepcopy(tensor, memo)
                set_tensor(target, name, value, leaf not in part._non_persistent_buffers_set)
