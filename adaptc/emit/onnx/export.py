"""The ONNX file: exported without weights, weights attached by name, cleaned up without reading one."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptc.emit.onnx import attention_operations
from adaptc.emit.onnx.lower_quantized import Integers, OnnxProducts
from adaptc.emit.onnx.overridable import Dims, declare_unread, make_overridable
from adaptc.emit.onnx.packed_products import PackedQueries
from adaptc.emit.onnx.quantized_operations import (
    integer_tensor,
    integer_type,
    ir_version_needed,
    opset_needed,
)
from adaptc.emit.onnx.registry import OPSET
from adaptc.emit.onnx.translate import translate
from adaptc.emit.onnx.widen import widen
from adaptc.errors import AdaptcError
from adaptc.ir.graph import Graph
from adaptc.progress.steps import step
from adaptc.rewriter.pipeline import run
from adaptc.tracing.export import quietly
from adaptc.weights import FileSlice, Weight

if TYPE_CHECKING:
    import torch

LOG = logging.getLogger(__name__)
INLINE_LIMIT = 2**28
"""Weights of more bytes in all go to a data file, which is written one tensor at a time. Chosen because a protobuf is
made in memory as a whole."""
ALIGNMENT, ALIGNED = 2**16, 2**20
"""A weight of more than `ALIGNED` bytes starts at a multiple of `ALIGNMENT` in the data file, so that every system can
map it into memory."""
SMALL = 2**10
"""Weights of no more bytes stay in the program: shapes and axes must be there."""
Wrote = Callable[[int, int], None]
"""Called with the bytes written so far, and of how many."""


@dataclass(frozen=True)
class Written:
    """An ONNX program that was written.

    Attributes:
        nodes: how many operations it has.
        opset: its opset.
        weights: the weights in its data file by name, to be read back; empty where there is none.
        large: whether the weights are more than `INLINE_LIMIT`.
    """

    nodes: int
    opset: int
    weights: Mapping[str, FileSlice]
    large: bool


def export_onnx(
    graph: Graph,
    path: Path,
    opset: int | None = None,
    metadata: Mapping[str, str] | None = None,
    wrote: Wrote | None = None,
    runtime: str = "onnxruntime",
    exact: bool = False,
    beside: bool = False,
    overridable: Dims | None = None,
    unread: Mapping[str, tuple[int, torch.dtype]] | None = None,
) -> Written:
    """Write a graph that only evaluates (see `evaluate`) as an ONNX program.

    Inputs, outputs and weights keep the model's names; named dimensions keep the spec's. A bfloat16 model computes in
    float32, from weights stored in bfloat16. Beyond `INLINE_LIMIT` bytes the weights are in a data file,
    `<name>.data` beside the program.

    Args:
        graph: the graph, which is not changed.
        path: the file to write.
        opset: the opset; if left out `OPSET`, or a later one that quantized weights need.
        metadata: the program's metadata.
        wrote: called while the data file is written.
        runtime: `onnxruntime` to write quantized matrix products for ONNX Runtime, `standard` for any runtime.
        exact: never round activations, see `OnnxProducts`.
        beside: write the data file whatever the size of the weights is.
        overridable: weights that a call may replace, see `make_overridable`.
        unread: tensors that a call may give, and nothing reads, see `declare_unread`.

    Raises:
        RefusedError: an operation has no ONNX form; names it.
        AdaptcError: the exporter fails, or a weight cannot be read.
    """
    graph = run(graph, [OnnxProducts(runtime, exact), PackedQueries()])
    attentions = [node for node in graph.nodes if node.target in attention_operations.STANDARD]
    packed = [weight.bits for weight in graph.weights.values() if isinstance(weight, Integers)]
    needed = [*map(opset_needed, packed), *(attention_operations.OPSET for _ in attentions)]
    with step(LOG, "exporting to ONNX"):
        model = translate(graph, opset or max([OPSET, *needed]))
    _attach(model, graph)
    with quietly():
        _clean_up(model, set(graph.weights))
    _name(model, graph)
    make_overridable(model, overridable or {})
    declare_unread(model, unread or {})
    widen(model)
    model.producer_name = "adaptc"
    model.ir_version = max([model.ir_version, *map(ir_version_needed, packed)])
    model.metadata_props.update(metadata or {})
    starts: dict[str, int] = {}
    data_file = data_file_of(path)
    total = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    if beside or total > INLINE_LIMIT:
        large = [v for v in model.graph.initializers.values() if v.const_value.nbytes > SMALL]
        starts = _write_data(large, data_file, wrote)
    path.write_bytes(_bytes(model))
    weights = {
        name: FileSlice(data_file, start, graph.weights[name].shape, graph.weights[name].dtype)
        for name, start in starts.items()
        if name in graph.weights
    }
    nodes = sum(1 for _ in model.graph)
    return Written(nodes, model.opset_imports[""], weights, total > INLINE_LIMIT)


def data_file_of(path: Path) -> Path:
    """The data file beside an ONNX program, which holds the weights where they are too many for one file."""
    return path.with_name(f"{path.name}.data")


def _bytes(model: object) -> bytes:
    """The program as the bytes of a file.

    Raises:
        AdaptcError: a weight cannot be read, or computed.
    """
    import onnx_ir as ir

    untyped: Any = ir
    try:
        return untyped.to_proto(model).SerializeToString()
    except ir.serde.SerdeError as error:  # it hides why a weight could not be loaded
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, AdaptcError):
            cause = cause.__cause__
        raise (cause or error) from error


def _write_data(weights: Sequence[Any], path: Path, wrote: Wrote | None) -> dict[str, int]:
    """Write the data of every weight into one file, a tensor at a time, and let the weight refer to it.

    Returns:
        The name of each weight -> the byte that it starts at.
    """
    import onnx_ir as ir

    total = sum(value.const_value.nbytes for value in weights)
    starts: dict[str, int] = {}
    with open(path, "wb") as file:
        for value in weights:
            tensor = value.const_value
            if tensor.nbytes > ALIGNED:
                file.seek(-file.tell() % ALIGNMENT, os.SEEK_CUR)
            offset = file.tell()
            tensor.tofile(file)
            value.const_value = ir.ExternalTensor(
                path.name,
                offset,
                tensor.nbytes,
                tensor.dtype,
                shape=tensor.shape,
                name=value.name,
                base_dir=path.parent,
            )
            starts[value.name] = offset
            if wrote:
                wrote(file.tell(), total)
    return starts


def _attach(model: Any, graph: Graph) -> None:
    """Give every initializer its weight, which is loaded when the file is written."""
    import onnx_ir as ir

    for name, value in model.graph.initializers.items():
        weight = graph.weights.get(name)
        if weight is not None:
            kind = value.const_value.dtype
            if isinstance(weight, Integers):
                kind = integer_type(weight.bits)
                value.type = ir.TensorType(kind)
            shape = (*weight.shape, 2) if weight.dtype.is_complex else weight.shape  # a number is a pair
            value.const_value = ir.LazyTensor(
                _loader(weight, name), dtype=kind, shape=ir.Shape(shape), name=name, cache=False
            )


def _loader(weight: Weight, name: str) -> Callable[[], Any]:
    """A function that loads a weight as a tensor of onnx_ir."""

    def load() -> Any:
        import torch
        from torch.onnx._internal.exporter._core import TorchTensor

        if isinstance(weight, Integers):
            return integer_tensor(weight.load(), weight.bits, name)
        tensor = weight.load().detach().contiguous()
        return TorchTensor(torch.view_as_real(tensor) if tensor.is_complex() else tensor, name=name)

    return load


def _clean_up(model: Any, weights: set[str]) -> None:
    """Inline functions, fold constants other than weights, drop unused nodes. No weight is read or renamed."""
    import onnxscript.optimizer as optimizer
    from onnx_ir.passes import common

    optimizer.inline(model)
    optimizer.fold_constants_ir(
        model,
        input_size_limit=4096,
        output_size_limit=2**20,
        onnx_shape_inference=False,
        should_fold=lambda node: (
            False if any(i is not None and i.name in weights for i in node.inputs) else None
        ),
    )
    for clean in (
        common.CommonSubexpressionEliminationPass(),
        common.IdentityEliminationPass(),
        common.LiftConstantsToInitializersPass(),
        common.RemoveUnusedNodesPass(),
        common.ClearMetadataAndDocStringPass(),
    ):
        clean(model)


def _name(model: Any, graph: Graph) -> None:
    """Name outputs as the model does, and dimensions as the spec does; forget intermediate shapes."""
    import onnx_ir as ir

    names: dict[str, str] = {}
    for spec, value in zip(graph.inputs, model.graph.inputs, strict=True):
        value.name = spec.name
        for index, dim in enumerate(spec.dims):
            if isinstance(dim, str):
                names.setdefault(_text(value.shape[index]), dim)
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = ir.Shape(
            [names.get(_text(d), _text(d)) if isinstance(d, ir.SymbolicDim) else d for d in value.shape]
        )
    for node in model.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None
    _name_outputs(model, graph.outputs)


def _name_outputs(model: Any, names: Sequence[str]) -> None:
    """Give the outputs their names. An intermediate value of such a name is renamed; an input keeps it."""
    _separate_outputs(model)
    outputs = set(model.graph.outputs)
    inner = [value for node in model.graph for value in node.outputs if value not in outputs]
    for number, value in enumerate(inner):
        if value.name in names:
            value.name = f"{value.name}.inner.{number}"
    taken = {value.name for value in (*model.graph.inputs, *model.graph.initializers.values())}
    for value, name in zip(model.graph.outputs, names, strict=True):
        free = name
        while free in taken:
            free += "_output"
        taken.add(free)
        value.name = free


def _separate_outputs(model: Any) -> None:
    """Give an output a node of its own where the graph, or branch, does not compute it, or it is an output twice."""
    import onnx_ir as ir

    for number, graph in enumerate((model.graph, *model.graph.subgraphs())):
        seen: set[Any] = set()
        for index, value in enumerate(graph.outputs):
            producer = value.producer()
            if producer is None or producer.graph is not graph or value in seen:
                node = ir.node("Identity", [value])
                output = node.outputs[0]
                output.name = f"{value.name}.output.{number}.{index}"
                output.type, output.shape = value.type, value.shape
                graph.append(node)
                graph.outputs[index] = output
            seen.add(value)


def _text(dim: object) -> str:
    """A dimension as text: its size, or the name of its symbol."""
    return str(getattr(dim, "value", dim))
