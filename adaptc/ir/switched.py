"""A module with several graphs over one set of weights: one of them is active."""

# torch has no public way to ask which buffers are no part of the state dict, nor what a graph's code was made for.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import copy
import functools
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from adaptc.errors import AdaptcError, unknown
from adaptc.ir.alternative import Alternative, Entries, Files, Maker
from adaptc.ir.conversion import ConvertedModule
from adaptc.ir.counted import COUNTED, let_count
from adaptc.ir.module import Segment
from adaptc.ir.nodes import drop_tensor, get_tensor, set_tensor
from adaptc.ir.row_calls import IDS, RowCalls, RowsGraph, check_ids
from adaptc.ir.shared_code import Key, SharedCode, own_reads, shared_code

ALTERNATIVES = "adaptc.alternatives"
"""The key of a module's `meta` that holds its graphs, so that copies of the module have them."""


class _Codes:
    """The code of the graphs that were active, by their names; equal code is there once."""

    def __init__(self, by_key: dict[Key, SharedCode] | None = None) -> None:
        self.by_key: dict[Key, SharedCode] = by_key or {}
        self.of: dict[str | None, tuple[fx.Graph, SharedCode]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> _Codes:
        """The same codes: they take the module that they run in."""
        return _Codes(dict(self.by_key))


class SwitchedModule(ConvertedModule):
    """A compiled module with alternatives: `set_adapter("alice")` makes one active, `set_adapter(None)` none.

    Every alternative's tensors are in the state dict, under names of their own. While one is active, it and what is
    always on require gradients, and no other does. While none is, all do, for calls with `adapter_ids`.

    `module(..., adapter_ids=ids)` gives each row of a batch its own: ids `(batch,)` in int64, an adapter's place in
    `adapters`, or -1 for the base. Which one is active does not matter then; gradients flow to all that require them.

    Graphs that differ in their tensors alone share one code, which takes these as arguments: `torch.compile` compiles
    it once for all of them.
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
        return self._alternatives[name].record

    def graph_of(self, name: str | None) -> fx.Graph:
        """The graph of an alternative; of what is always on under None."""
        return self._alternatives[name].graph

    def set_adapter(self, name: str | None) -> None:
        """Make an alternative active; None is the model with what is always on alone. No value changes.

        Raises:
            AdaptcError: there is no alternative of this name.
        """
        if name is not None:
            self._check(name)
        made, before = self._alternatives[name], self.active
        self.__dict__["_graph"] = made.graph
        self.meta |= {"adaptc.active": name, **made.record}
        self._take_code()
        self._let_learn(self.adapters if before is None or name is None else (before, name))

    def add_adapter(self, name: str, entries: Entries) -> None:
        """Add an alternative: nothing is traced or compiled again, no tensor of another changes, and none is activated.

        Args:
            name: its name.
            entries: the folder of a checkpoint, of PEFT's or adaptc's; or entries as under `adapters` in a spec. Paths
                are relative to the working directory.

        Raises:
            SpecError: an entry is wrong, or cannot be done.
            AdaptcError: the name is taken, or a checkpoint does not fit the base.
        """
        if name in self._alternatives:
            raise AdaptcError(
                f"there is an adapter {name!r} already; remove_adapter({name!r}) makes room for another"
            )
        self._take(name, self._maker.make(name, entries))

    def remove_adapter(self, name: str) -> None:
        """Remove an alternative and its tensors. Where it is active, none is afterwards.

        The places of those behind it in `adapters`, which `adapter_ids` names, move up by one.

        Raises:
            AdaptcError: there is no alternative of this name.
        """
        self._check(name)
        maker = self._maker
        if self.active == name:
            self.set_adapter(None)
        removed = self._alternatives[name]
        self.meta[ALTERNATIVES] = {n: a for n, a in self._alternatives.items() if n != name}
        for tensor in removed.tensors:
            drop_tensor(self, tensor)
        for node in removed.graph.find_nodes(op="call_module"):
            self.delete_submodule(str(node.target))
        self.__dict__["_codes"].of.pop(name, None)
        maker.forget(name)
        self._change_rows()

    def save_adapter(self, name: str, directory: str | os.PathLike[str]) -> None:
        """Write an alternative, active or not, as a checkpoint: PEFT's where PEFT has the method.

        Raises:
            AdaptcError: there is no alternative of this name, or it cannot be written.
        """
        self._check(name)
        self._services.files.save(self, name, Path(directory))

    def load_adapter(self, name: str, directory: str | os.PathLike[str]) -> None:
        """Replace the tensors of an alternative, active or not, by those of a checkpoint: all of them, or none.

        Raises:
            AdaptcError: there is no alternative of this name.
            WeightError: the checkpoint does not fit it.
        """
        self._check(name)
        self._services.files.load(self, name, Path(directory))

    def let_choose(self, rows: Callable[[], RowsGraph]) -> None:
        """Let calls name the adapter of each row.

        Args:
            rows: gives the graph for such calls; called for the first of them.
        """
        self.__dict__["_rows"] = RowCalls(rows)

    def let_change(self, maker: Maker) -> None:
        """Let alternatives be added and removed.

        Args:
            maker: makes and forgets them.
        """
        self._services.maker = maker

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
        """Generate the code of the active graph, after its nodes have changed."""
        if ALTERNATIVES not in getattr(self, "meta", {}):  # torch makes the module
            return super().recompile()
        self.__dict__["_codes"].of.pop(self.active, None)
        self._take_code()
        return self._graph.python_code("self")

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load tensors as torch does; they may take the places of those that are held."""
        result = super().load_state_dict(*args, **kwargs)
        self._hold()
        return result

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """What `to`, `double` and the like do; tensors may be replaced by others."""
        result = super()._apply(*args, **kwargs)
        self._hold()
        return result

    @property
    def _alternatives(self) -> Mapping[str | None, Alternative]:
        """Name -> alternative; None -> the graph without any."""
        return self.meta[ALTERNATIVES]

    @property
    def _services(self) -> _Services:
        return self.__dict__["_services"]

    @property
    def _maker(self) -> Maker:
        if self._services.maker is None:
            message = "this module is a copy: no adapter can be added to it or removed"
            raise AdaptcError(message, "change the module that it was copied from, and copy that again")
        return self._services.maker

    def _check(self, name: str) -> None:
        if name not in self.adapters:
            raise AdaptcError(unknown("adapter", name, self.adapters))

    def _let_learn(self, names: Iterable[str]) -> None:
        """Let alternatives require gradients where they are active, or none is."""
        for name in names:
            for tensor in self._alternatives[name].trained:
                get_tensor(self, tensor).requires_grad_(self.active in (None, name))

    def _take(self, name: str | None, other: fx.GraphModule) -> None:
        """Take a module's graph and tensors as an alternative."""
        present = {n for n, _ in named_tensors(self)}
        _share(self, other, None)
        for child, part in other.named_children():
            if isinstance(part, Segment):
                self.add_module(child, part)
        added = () if name is None else tuple(n for n, _ in named_tensors(other) if n not in present)
        base = present if name is not None else {n for n, _ in named_tensors(other)}
        made = Alternative(other.graph, dict(other.meta), added, own_reads(other.graph, base))
        self.meta[ALTERNATIVES] = {**self.meta.get(ALTERNATIVES, {}), name: made}
        if name is not None and "adaptc.active" in self.meta:
            self._let_learn([name])
            self._change_rows()

    def _take_code(self) -> None:
        """Have the code of the active graph, and the tensors that it takes."""
        codes, name = cast("_Codes", self.__dict__["_codes"]), self.active
        made = self._alternatives[name]
        graph, code = codes.of.get(name, (None, None))
        if code is None or graph is not made.graph:
            code = shared_code(self, made.graph, made.reads, codes.by_key)
            codes.by_key[code.key] = code
            codes.of[name] = made.graph, code
        self.__dict__["_code"], self.__dict__["_run"] = code.source, code.run
        self._hold()

    def _hold(self) -> None:
        """Hold the tensors that the active code takes, for torch.compile: a name that it reads would be a constant."""
        reads = self._alternatives[self.active].reads
        self.__dict__["_reads"], self.__dict__["_held"] = (
            reads,
            tuple(get_tensor(self, name) for name in reads),
        )

    def _tensors(self) -> tuple[torch.Tensor, ...]:
        """The tensors that the active code takes."""
        if torch.compiler.is_dynamo_compiling():
            return self.__dict__["_held"]
        return tuple(get_tensor(self, name) for name in self.__dict__["_reads"])

    def _change_rows(self) -> None:
        """Forget the graph of calls that name the adapter of each row: it is made anew for the next one."""
        rows: RowCalls = self.__dict__["_rows"]
        for name in rows.graph.constants if "graph" in vars(rows) else ():
            drop_tensor(self, name)
        self.let_choose(self._maker.rows)

    def _forward_by_row(self, ids: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call in which each row has its own adapter."""
        if not torch.compiler.is_compiling():
            check_ids(ids, self.adapters)
        rows: RowCalls = self.__dict__["_rows"]
        if not torch.compiler.is_compiling() or rows.forward is None:
            self.place_constants()
        if rows.forward is None:
            made = fx.GraphModule(self, rows.graph.graph)
            rows.forward = cast("Any", made).forward.__func__
        forward = cast("Callable[..., Any]", rows.forward)
        return forward(self, *args, **kwargs, **{IDS: ids})

    def __deepcopy__(self, memo: dict[int, Any]) -> SwitchedModule:
        """A copy with the tensors of every alternative: torch copies those that the active graph reads."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's own, from copying its pytree specs
            copied = cast("SwitchedModule", super().__deepcopy__(memo))
        _share(copied, self, memo)
        for child, part in self.named_children():
            if isinstance(part, Segment):
                copied.add_module(child, copy.deepcopy(part, memo))
        copied.__dict__["_codes"] = copy.deepcopy(self.__dict__["_codes"], memo)
        copied.__dict__["_services"] = _Services(None, self._services.files)
        copied.let_choose(self.__dict__["_rows"].make)
        _take_calls(copied, self.__dict__["_alone"])
        copied.set_adapter(self.active)
        return copied.train(self.training)


@dataclass
class _Services:
    """What makes the alternatives of a module, which a copy of it has not, and what writes and reads them."""

    maker: Maker | None
    files: Files

    def __deepcopy__(self, memo: dict[int, Any]) -> _Services:
        return _Services(None, self.files)


def switched(
    base: fx.GraphModule, alternatives: Mapping[str, fx.GraphModule], files: Files
) -> SwitchedModule:
    """One module of several: the graph and `meta` of each, and the tensors of all, those of `base` first.

    Args:
        base: the module without an alternative.
        alternatives: the modules with one of them.
        files: writes and reads their checkpoints.
    """
    module = SwitchedModule(nn.Module(), fx.Graph())
    module.__dict__["_codes"] = _Codes()
    for name, other in {None: base, **alternatives}.items():
        module._take(name, other)
    _take_calls(module, cast("Any", type(base)).forward)
    module.__dict__["_services"] = _Services(None, files)
    let_count(module, base.meta.get(COUNTED, {}))
    module.meta["adaptc.active"] = None
    module.set_adapter(None)
    return module


def _take_calls(module: SwitchedModule, alone: Callable[..., Any]) -> None:
    """Let a module take calls as one without alternatives does, and `adapter_ids` beside.

    Args:
        module: changed in place.
        alone: the forward of a module without alternatives, whose arguments people and libraries may ask for.
    """
    untyped: Any = module
    codegen = untyped.graph_of(None)._codegen
    module.__dict__["_alone"] = alone
    untyped._in_spec, untyped._out_spec = codegen.pytree_info.in_spec, codegen.pytree_info.out_spec

    @functools.wraps(alone)
    def forward(self: Any, *args: Any, adapter_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
        if adapter_ids is None:
            flat = self._run(self, *self._tensors(), *args, **kwargs)
        else:
            flat = self._forward_by_row(adapter_ids, args, kwargs)
        return pytree.tree_unflatten(list(flat), self._out_spec)

    untyped.__class__.forward = forward


def named_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The parameters and buffers of a module, under each of their names."""
    return [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]


def _share(target: nn.Module, source: nn.Module, memo: dict[int, Any] | None) -> None:
    """Give a module the parameters and buffers of another that it lacks.

    Args:
        target: changed in place.
        source: the other one.
        memo: of a deep copy, which copies of its tensors are taken from; None to take the tensors themselves.
    """
    present = {name for name, _ in named_tensors(target)}
    untyped: Any = source
    parts: dict[str, nn.Module] = dict(untyped.named_modules())
    for prefix, part in parts.items():
        tensors: dict[str, torch.Tensor | None] = {**part._parameters, **part._buffers}
        for leaf, tensor in tensors.items():
            name = f"{prefix}.{leaf}" if prefix else leaf
            if tensor is not None and name not in present:
                value = tensor if memo is None else copy.deepcopy(tensor, memo)
                set_tensor(target, name, value, leaf not in part._non_persistent_buffers_set)
