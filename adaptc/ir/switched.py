"""A module with several graphs over one set of weights: one of them is active."""

# torch has no public way to ask which buffers are no part of the state dict.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from adaptc.errors import AdaptcError, InputError, unknown
from adaptc.ir.conversion import ConvertedModule
from adaptc.ir.counted import COUNTED, let_count
from adaptc.ir.module import Segment
from adaptc.ir.nodes import set_tensor

ALTERNATIVES = "adaptc.alternatives"
"""The key of a module's `meta` that holds its graphs, so that copies of the module have them."""


IDS = "adapter_ids"
"""The argument that names the adapter of each row: its place in `adapters`, or -1 for the base."""


@dataclass(frozen=True)
class RowsGraph:
    """The graph of calls that name the adapter of each row.

    Attributes:
        graph: it reads the tensors of all adapters, takes the inputs by name and `adapter_ids`, and gives a flat tuple.
        constants: name -> tensors of its own.
        record: what an artifact says of it.
    """

    graph: fx.Graph
    constants: Mapping[str, torch.Tensor]
    record: Mapping[str, Any]


GENERATED = ("_code", "_in_spec", "_out_spec")
"""What torch generates of a graph, beside its forward."""


class _Codes:
    """The code of the graphs that were active: name -> the graph, and what was generated of it."""

    def __init__(self) -> None:
        self.of: dict[str | None, tuple[fx.Graph, dict[str, Any]]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> _Codes:
        """None: a copy of a module has graphs of its own."""
        return _Codes()


class _Rows:
    """Makes the graph of calls that name the adapter of each row, when the first one comes."""

    def __init__(self, make: Callable[[], RowsGraph]):
        self.make = make
        self.forward: Any = None

    @functools.cached_property
    def graph(self) -> RowsGraph:
        """The graph."""
        return self.make()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Rows:
        """The same source: what it is made of is not copied with a module."""
        return _Rows(self.make)


class SwitchedModule(ConvertedModule):
    """A compiled module with alternatives: `set_adapter("alice")` makes one active, `set_adapter(None)` none.

    Every alternative's tensors are in the state dict, under names of their own. Gradients flow to those of the active
    one, and of what is always on.

    `module(..., adapter_ids=ids)` gives each row of a batch its own: ids `(batch,)` in int64, an adapter's place in
    `adapters`, or -1 for the base. Which one is active does not matter then, and gradients flow to all that are named.
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
        codes: _Codes = self.__dict__.setdefault("_codes", _Codes())
        made = codes.of.get(name)
        if made is not None and made[0] is graph:
            state = made[1]
            self.__dict__["_graph"] = graph
            self.__dict__.update({key: state[key] for key in GENERATED})
            untyped: Any = type(self)
            untyped.forward = state["forward"]
        else:
            self.graph = graph
            state = {"forward": type(self).forward} | {key: self.__dict__.get(key) for key in GENERATED}
            codes.of[name] = graph, state
        self.meta |= {"adaptc.active": name, **record}

    def let_choose(self, rows: Callable[[], RowsGraph]) -> None:
        """Let calls name the adapter of each row.

        Args:
            rows: gives the graph for such calls; called for the first of them.
        """
        self.__dict__["_rows"] = _Rows(rows)

    def rows_graph(self) -> RowsGraph:
        """The graph of calls that name the adapter of each row.

        Raises:
            AdaptcError: there is none; says why.
        """
        return self.__dict__["_rows"].graph

    def place_constants(self) -> None:
        """Have the constants of the graph of calls that name the adapter of each row."""
        present = {name for name, _ in self.named_buffers()}
        for name, value in self.rows_graph().constants.items():
            if name not in present:
                set_tensor(self, name, value, persistent=False)

    def recompile(self) -> Any:
        """Generate the code of the active graph; calls with `adapter_ids` go to another."""
        code = super().recompile()
        codes: _Codes = self.__dict__.setdefault("_codes", _Codes())
        codes.of = {name: made for name, made in codes.of.items() if made[0] is not self._graph}
        untyped: Any = type(self)
        untyped.forward = _by_row_too(untyped.forward)
        return code

    def _forward_by_row(self, ids: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call in which each row has its own adapter."""
        if not torch.compiler.is_compiling():
            _check_ids(ids, self.adapters)
        rows: _Rows = self.__dict__["_rows"]
        if not torch.compiler.is_compiling() or rows.forward is None:
            self.place_constants()
        if rows.forward is None:
            made = fx.GraphModule(self, rows.graph.graph)
            rows.forward = cast("Any", made).forward.__func__
        flat: Any = rows.forward(self, *args, **kwargs, **{IDS: ids})
        untyped: Any = self
        return pytree.tree_unflatten(list(flat), untyped._out_spec)

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
        copied.let_choose(self.__dict__["_rows"].make)
        copied.set_adapter(self.active)
        return copied.train(self.training)


def _by_row_too(alone: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that takes `adapter_ids` beside what the active graph takes."""

    @functools.wraps(alone)
    def forward(self: Any, *args: Any, adapter_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
        if adapter_ids is None:
            return alone(self, *args, **kwargs)
        return self._forward_by_row(adapter_ids, args, kwargs)

    return forward


def _check_ids(ids: torch.Tensor, names: Sequence[str]) -> None:
    """Check that every row names an adapter.

    Raises:
        InputError: they are no integers, or one is out of range.
    """
    if ids.dim() != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise InputError(f"adapter_ids: expected int64[batch], got {ids.dtype} {list(ids.shape)}")
    wrong = ids[(ids < -1) | (ids >= len(names))]
    if len(wrong):
        listed = ", ".join(f"{place} {name}" for place, name in enumerate(names))
        raise InputError(
            f"adapter_ids: expected -1 (the base) to {len(names) - 1}, got {int(wrong[0])}", listed
        )


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
