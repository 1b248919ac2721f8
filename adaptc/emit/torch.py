"""The torch artifact: a `torch.export` program, and how it becomes a trainable module again."""

# A graph's calling convention has no public name.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import io
import json
from collections import namedtuple
from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph import CodeGen, _PyTreeCodeGen
from torch.utils import _pytree as pytree

from adaptc.checkpoints.module_adapters import AlternativeFiles
from adaptc.emit.manifest import MANIFEST
from adaptc.errors import AdaptcError, RefusedError, WeightError
from adaptc.inputs import InputSpec
from adaptc.ir.conversion import META, ConvertedModule
from adaptc.ir.counted import counted_by, let_count
from adaptc.ir.example_inputs import example_sizes, example_tensors
from adaptc.ir.module import Segment, kept_activations
from adaptc.ir.nodes import set_tensor
from adaptc.ir.row_calls import RowsGraph
from adaptc.ir.switched import SwitchedModule, switched
from adaptc.ir.training_mode import mark_training_arguments
from adaptc.optional import optional
from adaptc.tracing.export import dynamic_shapes, normalise, traceable
from adaptc.tracing.saved_program import load_program

PROGRAM, ALTERNATIVES, ROWS = "program.pt2", "adapters", "rows.pt2"
LIBRARIES = ("builtins", "collections", "torch", "transformers")
"""The packages whose classes of outputs are known wherever a program is loaded."""


def save_torch(module: fx.GraphModule, directory: Path) -> None:
    """Write a trainable module as a program that loads without pickle and without the base's files.

    The program is traced in training mode; `load_torch` makes its literals follow the module's mode again. Of a module
    with alternatives each has a program of its own, which holds the tensors of that alternative alone.

    Raises:
        OSError: the file cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if not isinstance(module, SwitchedModule):
        _save(module, directory / PROGRAM)
        return
    active, base = module.active, module.meta_of(None)[META]["names"]
    try:
        for name in (None, *module.adapters):
            module.set_adapter(name)
            path = directory / PROGRAM if name is None else directory / program_of(name)
            path.parent.mkdir(exist_ok=True)
            elsewhere = () if name is None else base
            _save(alone(module, module.graph, module.meta[META], elsewhere), path)
    finally:
        module.set_adapter(active)
    rows = rows_of(module)
    if rows is not None:
        module.place_constants()
        others = {n for name in module.adapters for n in module.meta_of(name)[META]["names"]}
        _save(alone(module, rows.graph, rows.record, {*base, *others}), directory / ROWS)


def rows_of(module: SwitchedModule) -> RowsGraph | None:
    """The graph of calls that name the adapter of each row; None where rows meet, so that there is none."""
    try:
        return module.rows_graph()
    except RefusedError:
        return None


def program_of(name: str) -> str:
    """The file of an alternative in a torch artifact."""
    return f"{ALTERNATIVES}/{name}.pt2"


def alone(
    module: SwitchedModule, graph: fx.Graph, about: Mapping[str, Any], elsewhere: Collection[str]
) -> fx.GraphModule:
    """A graph of a module as a module of its own.

    Args:
        module: the module.
        graph: the graph.
        about: what an artifact says of it.
        elsewhere: the names of tensors that another program holds: a number stands for each.
    """
    alone = fx.GraphModule(nn.Module(), fx.Graph())
    tensors = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    made = dict[str, torch.Tensor]()
    for name, first in about["names"].items():
        tensor = tensors[name]
        if first not in made and name in elsewhere and not _may_be_written(tensor):
            stand_in = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
            is_parameter = isinstance(tensor, nn.Parameter)
            made[first] = nn.Parameter(stand_in, requires_grad=False) if is_parameter else stand_in
        set_tensor(alone, name, made.setdefault(first, tensor), name not in about["transient"])
    for name, child in module.named_children():
        if isinstance(child, Segment):
            alone.add_module(name, child)
    alone.graph = graph
    alone.meta[META] = about
    return alone.train(module.training)


def _may_be_written(tensor: torch.Tensor) -> bool:
    """Whether a graph may write to a tensor, as to the statistics of batch norm; codes of few bits are integers."""
    return not isinstance(tensor, nn.Parameter) and (tensor.is_floating_point() or tensor.dim() == 0)


def _save(module: fx.GraphModule, path: Path) -> None:
    """Write one graph of a module as a program.

    Raises:
        OSError: the file cannot be written.
    """
    about = module.meta[META]
    inputs = [InputSpec.from_json(spec) for spec in about["inputs"]]
    examples = example_tensors(inputs, example_sizes(inputs))
    training: bool = module.training
    untyped: Any = module
    registered: dict[int, Any] = untyped._forward_pre_hooks
    hooks = dict(registered)
    module.train()
    registered.clear()  # hooks of a training loop are no part of the program
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    try:
        with traceable(), kept_activations(module), _plain_outputs(module, about):
            program = torch.export.export(
                module, (), examples, dynamic_shapes=dynamic_shapes(inputs), strict=False
            )
            with _Deferring(path, "w") as file:
                torch.export.save(program, file)
            if file.error is not None:
                raise file.error
    finally:
        module.train(training)
        registered.update(hooks)
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                if 0 not in buffer.stride():  # one number in the place of a tensor is not written to
                    buffer.copy_(buffers[name])


@contextmanager
def _plain_outputs(module: fx.GraphModule, about: Mapping[str, Any]) -> Generator[None]:
    """Let a module give a dict of its outputs by name inside this block, where their class is the author's own.

    A program must load where that class is not.
    """
    codegen: Any = module.graph._codegen
    if not isinstance(codegen, _PyTreeCodeGen):  # a plain tuple already
        yield
        return
    info = codegen.pytree_info
    if not _is_portable(info.out_spec):
        plain = pytree.tree_structure(dict.fromkeys(about["outputs"], 0))
        codegen.pytree_info = info._replace(out_spec=plain)
        module.recompile()
    try:
        yield
    finally:
        codegen.pytree_info = info
        module.recompile()


def _is_portable(spec: Any) -> bool:
    """Whether outputs are tensors, or in classes of `LIBRARIES` alone."""
    if spec.is_leaf():
        return True
    library = spec.type.__module__.split(".")[0] in LIBRARIES and spec.type is not namedtuple
    return library and all(map(_is_portable, spec.children()))


class _Deferring(io.FileIO):
    """A file that keeps its first error for later: torch's writer aborts the process where a write fails."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write, unless an earlier write failed; gives the number of bytes in either case."""
        remaining = memoryview(data)
        while remaining and self.error is None:
            try:
                remaining = remaining[super().write(remaining) :]
            except OSError as error:
                self.error = error
        return len(data)


def load_torch(directory: Path) -> fx.GraphModule:
    """Load a torch artifact as a trainable module.

    Raises:
        WeightError: it is no such artifact, or broken.
    """
    manifest = directory / MANIFEST
    if not manifest.is_file() or not (directory / PROGRAM).is_file():
        raise WeightError(
            f"{directory}: not a torch artifact of adaptc; expected {MANIFEST} and {PROGRAM} there"
        )
    try:
        artifact = json.loads(manifest.read_text())["products"][PROGRAM]
        about, others = artifact["module"], artifact.get("alternatives")
    except (json.JSONDecodeError, KeyError) as error:
        raise WeightError(f"{manifest}: broken, or not of a torch artifact ({error})") from None
    home = about["output_class"].rpartition(".")[0]
    if home.startswith("transformers."):
        optional(home)  # makes its output class known to torch.export
    base = _load(directory / PROGRAM, about)
    if others is None:
        return base
    modules = {name: _load(directory / program_of(name), record) for name, record in others.items()}
    module = switched(base, modules, AlternativeFiles()).train()
    rows = artifact.get("rows")
    module.let_choose(lambda: _load_rows(module, directory, rows))
    return module


def _load_rows(module: SwitchedModule, directory: Path, record: Mapping[str, Any] | None) -> RowsGraph:
    """The graph of calls that name the adapter of each row.

    Raises:
        AdaptcError: the artifact has none.
        WeightError: it is broken.
    """
    if record is None:
        raise AdaptcError("adapter_ids: rows meet in this model, so that they have no adapters of their own")
    rows = _load(directory / ROWS, record)
    present = {n for n, _ in (*module.named_parameters(remove_duplicate=False), *module.named_buffers())}
    tensors = (*rows.named_parameters(remove_duplicate=False), *rows.named_buffers(remove_duplicate=False))
    constants = {name: tensor.detach() for name, tensor in tensors if name not in present}
    rows.graph.set_codegen(CodeGen())
    return RowsGraph(rows.graph, constants, record)


def _load(path: Path, about: Mapping[str, Any]) -> fx.GraphModule:
    """One program as a trainable module.

    Raises:
        WeightError: it is broken.
    """
    program = load_program(path)
    module = normalise(program.module(check_guards=False))
    mark_training_arguments(module.graph)
    module.recompile()
    return _restore(module, about)


def _restore(module: fx.GraphModule, about: Mapping[str, Any]) -> fx.GraphModule:
    """The module with the tensors of the program under the base's names, in its order, tied tensors as one.

    Only the adaptation requires grad.

    Raises:
        WeightError: the program lacks a tensor that the manifest names.
    """
    trainable = set(about["trainable"])
    restored: dict[str, torch.Tensor] = {}
    result = ConvertedModule(nn.Module(), fx.Graph())
    tensors = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    for name, first in about["names"].items():
        if first not in restored:
            spelled = next((n for n in (first, *_aliases(about["names"], first)) if n in tensors), None)
            if spelled is None:
                raise WeightError(f"the program holds no tensor {first!r}, which the manifest names")
            tensor = tensors[spelled]
            restored[first] = (
                tensor.detach()
                if first in about["buffers"]
                else nn.Parameter(tensor.detach(), first in trainable)
            )
        set_tensor(result, name, restored[first], persistent=name not in about["transient"])
    for name, tensor in tensors.items():  # constants of the graph itself
        if name not in about["names"]:
            set_tensor(result, name, tensor.detach(), persistent=False)
    result.graph = module.graph
    result.meta[META] = dict(about)
    let_count(result, counted_by([InputSpec.from_json(spec) for spec in about["inputs"]]))
    return result.train()


def _aliases(names: Mapping[str, str], first: str) -> list[str]:
    """The names of the tensor whose first name is this."""
    return [name for name, other in names.items() if other == first]
