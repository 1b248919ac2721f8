"""From the graph to ONNX operations: what the exporter has no word for is rewritten; nothing is traced again."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.utils import _pytree as pytree

from adaptc.emit.onnx.casts import Casts
from adaptc.emit.onnx.decompose import EXPECTED, OnnxOperations, vocabulary
from adaptc.emit.onnx.functional import Functional
from adaptc.emit.onnx.operations import COMPLEX, translations
from adaptc.errors import AdaptcError, RefusedError, VerifyError
from adaptc.ir.graph import Graph
from adaptc.ir.nodes import get_tensor, provenance
from adaptc.rewriter.pipeline import run
from adaptc.tracing.export import quietly


def _registry(graph: Graph, opset: int) -> Any:
    """The exporter's registry of what a graph computes with; making all of it would take longer than the rest."""
    from torch.onnx._internal.exporter import _constants, _registration
    from torch.onnx._internal.exporter._torchlib import _torchlib_registry

    registry = _registration.ONNXRegistry()
    registry._opset_version = max(opset, _constants.TORCHLIB_OPSET)
    targets: dict[Any, None] = dict.fromkeys(n.target for n in graph.nodes if n.op == "call_function")
    for meta in _torchlib_registry.get_torchlib_ops():
        if meta.fx_target in targets:
            registry._register(meta.fx_target, meta)
    for target in targets:
        known = vocabulary()[0].get(target)
        if known is None:
            continue
        for is_complex in (False, True):
            for function in known.complex if is_complex else known.overloads:
                meta = _registration.OnnxDecompMeta(function, target, None, is_complex=is_complex)
                registry._register(target, meta)
    registry._cleanup_registry_based_on_opset_version()
    for target, function in translations(targets).items():
        registry.register_op(target, function, is_complex=target.name() in COMPLEX)
    return registry


def translate(graph: Graph, opset: int) -> Any:
    """The ONNX model of a graph that only evaluates; its initializers have shapes and no data.

    Raises:
        RefusedError: an operation has no ONNX form; names it.
        AdaptcError: the exporter fails on one.
    """
    from onnxscript import version_converter
    from torch.onnx._internal.exporter import _core

    try:
        with quietly(), torch.no_grad():
            graph = run(graph, [Functional(), OnnxOperations(), Casts()])
            program, registry = _program(graph), _registry(graph, opset)
            model = _core._exported_program_to_onnx_program(program, registry=registry).model
            version_converter.convert_version(model, opset, fallback=True)
            return model
    except (RefusedError, VerifyError):
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        words = next(
            (line for line in lines if "No ONNX function" in line or "aten." in line),
            lines[0] if lines else "",
        )
        where = next((provenance(node) for node in graph.nodes if f"%{node.name} " in str(error)), ())
        raise AdaptcError(f"ONNX export failed: {type(error).__name__}: {words}", *where, EXPECTED) from error


def _program(graph: Graph) -> ExportedProgram:
    """The graph with its weights as inputs, which is how torch.export writes a program."""
    nodes, mapping = fx.Graph(), {}
    specs: list[InputSpec] = []
    read: dict[str, fx.Node] = {}
    for node in graph.nodes:
        name = str(node.target)
        if node.op == "get_attr" and name not in read:
            read[name] = made = nodes.placeholder(f"weight_{len(read)}")
            made.meta = {"val": node.meta["val"]}
            parameter = isinstance(get_tensor(graph.module, name), torch.nn.Parameter)
            kind = InputKind.PARAMETER if parameter else InputKind.BUFFER
            specs.append(InputSpec(kind, TensorArgument(made.name), name, None if parameter else True))
    for node in graph.nodes:
        if node.op == "get_attr":
            mapping[node] = read[str(node.target)]
            continue
        mapping[node] = nodes.node_copy(node, mapping.__getitem__)
        if node.op == "placeholder":
            specs.append(InputSpec(InputKind.USER_INPUT, TensorArgument(mapping[node].name), None))
    results: Any = mapping[next(node for node in graph.nodes if node.op == "output")].args[0]
    outputs = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in results]
    tree = pytree.tree_structure(((), {}))
    call = ModuleCallEntry("", ModuleCallSignature([], [], tree, pytree.tree_structure(0)))
    return ExportedProgram(
        root=torch.nn.Module(),
        graph=nodes,
        graph_signature=ExportGraphSignature(specs, outputs),
        state_dict={name: get_tensor(graph.module, name) for name in read},
        range_constraints={},
        module_call_graph=[call],
    )
