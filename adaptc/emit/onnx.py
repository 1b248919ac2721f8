"""ONNX: exported without weights, weights attached by name, tidied without reading one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from adaptc.emit.inference import inference_graph
from adaptc.errors import AdaptcError
from adaptc.graph import Graph
from adaptc.tracing.export import dynamic_shapes, example_sizes, example_tensors
from adaptc.tracing.quiet import quietly
from adaptc.weights import Weight

OPSET = 20
"""The default opset: every ONNX Runtime since 1.17 runs it."""
INLINE_LIMIT = 2**31 - 2**24
"""Weights beyond this many bytes go to a file beside the model: a protobuf holds less than 2 GiB."""


def export_onnx(
    graph: Graph, path: Path, opset: int | None = None, metadata: Mapping[str, str] | None = None
) -> int:
    """Write a graph as an ONNX program; gives the number of its nodes.

    Inputs, outputs and weights keep the model's names; named dimensions keep the spec's. Past 2 GiB the weights
    stand in `<name>.data` beside the file.

    Raises:
        AdaptcError: an operation has no ONNX form; names it.
    """
    import onnx_ir as ir

    graph = inference_graph(graph)
    model = _export(graph, opset or OPSET)
    _attach(model, graph)
    _tidy(model, set(graph.weights))
    _name(model, graph)
    model.producer_name = "adaptc"
    model.metadata_props.update(metadata or {})
    total = sum(
        value.const_value.nbytes
        for value in model.graph.initializers.values()
        if value.const_value is not None
    )
    external = f"{path.name}.data" if total > INLINE_LIMIT else None
    ir.save(model, path, external_data=external)
    return sum(1 for _ in model.graph)


def _export(graph: Graph, opset: int) -> Any:
    from adaptc.emit.onnx_operations import translations

    examples = example_tensors(graph.inputs, example_sizes(graph.inputs))
    graph.module.eval()
    try:
        with quietly():
            program = torch.export.export(
                graph.module, (), examples, dynamic_shapes=dynamic_shapes(graph.inputs), strict=False
            )
            exported = torch.onnx.export(
                program,
                dynamo=True,
                optimize=False,
                verbose=False,
                opset_version=opset,
                custom_translation_table=translations(program.graph),
            )
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        words = next(
            (line for line in lines if "No ONNX function" in line or "aten." in line),
            lines[0] if lines else "",
        )
        raise AdaptcError(f"ONNX export failed: {type(error).__name__}: {words}") from error
    assert exported is not None
    return exported.model


def _attach(model: Any, graph: Graph) -> None:
    """Give every initializer its weight, loaded when the file is written."""
    import onnx_ir as ir

    for name, value in model.graph.initializers.items():
        weight = graph.weights.get(name)
        if weight is not None:
            kind = value.const_value.dtype
            value.const_value = ir.LazyTensor(
                _loader(weight, name), dtype=kind, shape=ir.Shape(weight.shape), name=name, cache=False
            )


def _loader(weight: Weight, name: str) -> Callable[[], Any]:
    def load() -> Any:
        from torch.onnx._internal.exporter._core import TorchTensor

        return TorchTensor(weight.load().detach().contiguous(), name=name)

    return load


def _tidy(model: Any, weights: set[str]) -> None:
    """Inline functions, fold what holds no weight, and drop what is dead. No weight is read or renamed."""
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
    for tidy in (
        common.CommonSubexpressionEliminationPass(),
        common.IdentityEliminationPass(),
        common.LiftConstantsToInitializersPass(),
        common.RemoveUnusedNodesPass(),
        common.ClearMetadataAndDocStringPass(),
    ):
        tidy(model)


def _name(model: Any, graph: Graph) -> None:
    """Name outputs as the model does, and dimensions as the spec does; forget intermediate shapes."""
    import onnx_ir as ir

    known: dict[str, str] = {}
    for spec, value in zip(graph.inputs, model.graph.inputs, strict=True):
        value.name = spec.name
        for index, dim in enumerate(spec.dims):
            if isinstance(dim, str):
                known.setdefault(str(_text(value.shape[index])), dim)
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = ir.Shape(
            [known.get(_text(d), _text(d)) if isinstance(d, ir.SymbolicDim) else d for d in value.shape]
        )
    for node in model.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None
    _name_outputs(model, graph.outputs)


def _name_outputs(model: Any, names: Sequence[str]) -> None:
    """Give the outputs their names; an intermediate that has one gives way, an input keeps its own."""
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
    """A value that is an output twice, or an input too, gets a node of its own for each name."""
    import onnx_ir as ir

    seen = set(model.graph.inputs) | set(model.graph.initializers.values())
    for index, value in enumerate(model.graph.outputs):
        if value in seen:
            node = ir.node("Identity", [value])
            node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
            model.graph.append(node)
            model.graph.outputs[index] = node.outputs[0]
        seen.add(value)


def _text(dim: Any) -> str:
    return str(getattr(dim, "value", dim))


def onnx_runner(
    path: Path, shown: Path | None = None
) -> Callable[[Mapping[str, torch.Tensor]], Sequence[torch.Tensor]]:
    """Run an ONNX file in ONNX Runtime, on one thread that does not spin."""
    session = open_session(path, shown=shown)
    names = {value.name for value in session.get_inputs()}

    def call(tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        feeds = {name: tensor.numpy() for name, tensor in tensors.items() if name in names}
        return [torch.from_numpy(array) for array in session.run(None, feeds)]

    return call


def open_session(path: Path, threads: int = 1, shown: Path | None = None) -> Any:
    """An ONNX Runtime session on the CPU; `shown` is what an error calls the file.

    Raises:
        AdaptcError: ONNX Runtime does not take the program.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise AdaptcError(f"{shown or path}: ONNX Runtime does not take it: {error}") from error
