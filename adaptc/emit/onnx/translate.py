"""From a graph to ONNX operations: unknown operations are rewritten, then torch's exporter translates the rest."""

# pyright: reportPrivateUsage=false
# torch's exporter of a program that is exported already has no public name.

from __future__ import annotations

from typing import Any, cast

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
from adaptc.emit.onnx.decompose import EXPECTED, OnnxOperations
from adaptc.emit.onnx.functional import Functional
from adaptc.emit.onnx.registry import registry_of
from adaptc.errors import AdaptcError, Refusal, RefusedError, VerifyError
from adaptc.ir.graph import Graph
from adaptc.ir.nodes import get_tensor, provenance
from adaptc.rewriter.pipeline import run
from adaptc.tracing.export import quietly


def translate(graph: Graph, opset: int) -> Any:
    """The ONNX model (onnx_ir) of a graph that only evaluates; its initializers have shapes and no data.

    Raises:
        RefusedError: an operation has no ONNX form, or an input or output is complex; names it.
        AdaptcError: the exporter fails on an operation.
    """
    from onnxscript import version_converter
    from torch.onnx._internal.exporter import _core

    _check_real(graph)
    try:
        with quietly(), torch.no_grad():
            graph = run(graph, [Functional(), OnnxOperations(opset), Casts()])
            program, registry = _program(graph), registry_of(graph.nodes, opset)
            model = _core._exported_program_to_onnx_program(program, registry=registry).model
            converter: Any = version_converter
            converter.convert_version(model, opset, fallback=True)
            return model
    except (RefusedError, VerifyError):
        raise
    except Exception as error:
        raise _failure(graph, error) from error


def _check_real(graph: Graph) -> None:
    """Check that no input and no output is complex: inside of a program complex numbers are pairs of real ones.

    Raises:
        RefusedError: names one that is.
    """
    results = cast("tuple[fx.Node, ...]", next(n for n in graph.nodes if n.op == "output").args[0])
    values = [
        *((f"input {node.target}", node, "take its real and imaginary parts") for node in graph.placeholders),
        *(
            (f"output {name}", node, "return torch.view_as_real of it")
            for name, node in zip(graph.outputs, results, strict=True)
        ),
    ]
    for name, node, mend in values:
        if node.meta["val"].is_complex():
            reason = (
                f"ONNX export failed: {name} is complex, and ONNX Runtime takes and gives real numbers only"
            )
            raise RefusedError([Refusal(reason, notes=(*provenance(node), f"let forward {mend}"))])


def _failure(graph: Graph, error: Exception) -> AdaptcError:
    """The error where the exporter fails: which operation it takes not so, and why."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    why = next((line.strip() for line in str(cause).splitlines() if line.strip()), "")
    reason = f"{type(cause).__name__}: {why}"
    node = next((node for node in graph.nodes if f"%{node.name} " in str(error)), None)
    if node is None:
        return AdaptcError(f"ONNX export failed: {reason}", EXPECTED)
    message = f"ONNX export failed: the form of {node.target} does not take these arguments ({reason})"
    return AdaptcError(message, *provenance(node), EXPECTED)


def _program(graph: Graph) -> ExportedProgram:
    """The graph with its weights as inputs, which is how torch.export writes a program."""
    nodes = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    specs: list[InputSpec] = []
    weights: dict[str, fx.Node] = {}
    for node in graph.nodes:
        name = str(node.target)
        if node.op == "get_attr" and name not in weights:
            weights[name] = weight = nodes.placeholder(f"weight_{len(weights)}")
            weight.meta = {"val": node.meta["val"]}
            parameter = isinstance(get_tensor(graph.module, name), torch.nn.Parameter)
            kind = InputKind.PARAMETER if parameter else InputKind.BUFFER
            specs.append(InputSpec(kind, TensorArgument(weight.name), name, None if parameter else True))
    for node in graph.nodes:
        if node.op == "get_attr":
            copies[node] = weights[str(node.target)]
            continue
        copies[node] = nodes.node_copy(node, copies.__getitem__)
        copies[node].meta.setdefault("nn_module_stack", {})  # the exporter logs a warning without one
        if node.op == "placeholder":
            specs.append(InputSpec(InputKind.USER_INPUT, TensorArgument(copies[node].name), None))
    results: Any = copies[next(node for node in graph.nodes if node.op == "output")].args[0]
    outputs = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in results]
    tree = pytree.tree_structure(((), {}))
    call = ModuleCallEntry("", ModuleCallSignature([], [], tree, pytree.tree_structure(0)))
    return ExportedProgram(
        root=torch.nn.Module(),
        graph=nodes,
        graph_signature=ExportGraphSignature(specs, outputs),
        state_dict={name: get_tensor(graph.module, name) for name in weights},
        range_constraints={},
        module_call_graph=[call],
    )
