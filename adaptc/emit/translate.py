"""From the graph to ONNX operations: what the exporter has no word for is rewritten; nothing is traced again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Set
from functools import cache
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
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
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg
from torch.fx.traceback import preserve_node_meta
from torch.utils import _pytree as pytree

from adaptc.emit.onnx_operations import COMPLEX, translations
from adaptc.errors import AdaptcError
from adaptc.graph import ORIGIN, Graph, attribute
from adaptc.memory import writes
from adaptc.sites import place_of
from adaptc.tracing.export import dynamic_shapes, example_sizes, example_tensors, normalise
from adaptc.tracing.quiet import quietly


@cache
def _vocabulary() -> tuple[Mapping[Any, Any], Mapping[Any, Callable[..., Any]]]:
    """The exporter's functions by the operation they stand for, and decompositions of those it has none for."""
    from onnxscript.function_libs.torch_lib import ops, registration
    from torch.onnx._internal.exporter import _decomp, _registration
    from torch.onnx._internal.exporter._torchlib import _torchlib_registry

    quiet = logging.getLogger("torch.onnx._internal.exporter._registration")
    quiet.setLevel(logging.ERROR)  # it warns of every operation of packages that are not installed
    assert ops is not None  # they are registered when they are imported
    found: dict[Any, Any] = {
        _registration._get_overload(name): functions
        for name, functions in registration.default_registry.items()
        if not name.startswith("internal::")
    }
    for meta in _torchlib_registry.get_torchlib_ops():
        found.setdefault(meta.fx_target, registration.OverloadedFunction(""))
    found.pop(None, None)
    return found, _decomp.create_onnx_friendly_decomposition_table(set(found))


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
        known = _vocabulary()[0].get(target)
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
        AdaptcError: an operation has no ONNX form; names it.
    """
    from onnxscript import version_converter
    from torch.onnx._internal.exporter import _core

    try:
        with quietly(), torch.no_grad():
            graph = functional(graph)
            functions, table = _vocabulary()
            with graph.fake_mode:  # of operations that make a constant too
                _lower(graph, {*functions, *translations(n.target for n in graph.nodes)}, table)
            _promote(graph)
            program, registry = _program(graph), _registry(graph, opset)
            model = _core._exported_program_to_onnx_program(program, registry=registry).model
            version_converter.convert_version(model, opset, fallback=True)
            return model
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        words = next(
            (line for line in lines if "No ONNX function" in line or "aten." in line),
            lines[0] if lines else "",
        )
        where = next((place_of(node) for node in graph.nodes if f"%{node.name} " in str(error)), "")
        raise AdaptcError(
            f"ONNX export failed: {type(error).__name__}: {words}{where}\n"
            "  expected operations that ONNX has a form for; products in other formats (torch, hf) do not need one"
        ) from error


def functional(graph: Graph) -> Graph:
    """A copy in which no operation changes its operands: an ONNX value is written once."""
    graph = graph.copy()
    if not any(writes(node.target) for node in graph.nodes):
        return graph
    examples = example_tensors(graph.inputs, example_sizes(graph.inputs))
    shapes = dynamic_shapes(graph.inputs)
    program = torch.export.export(graph.module.eval(), (), examples, dynamic_shapes=shapes, strict=False)
    traced = normalise(program.run_decompositions({}).module(check_guards=False))
    graph.module.graph = traced.graph
    return graph


def _lower(graph: Graph, known: Set[Any], table: Mapping[Any, Callable[..., Any]]) -> None:
    """Write every operation that the exporter does not know in others, each traced by itself."""
    nodes = graph.module.graph
    for node in list(nodes.nodes):
        if node.op != "call_function" or node.target in known:
            continue
        if node.target is getattr:  # the device of the inputs, which an ONNX program does not choose
            for user in list(node.users):
                user.args = tuple(torch.device("cpu") if a is node else a for a in user.args)
                user.kwargs = {k: torch.device("cpu") if v is node else v for k, v in user.kwargs.items()}
            nodes.erase_node(node)
        elif node.target in table or _is_composite(node.target):
            _decompose(nodes, node, table)
    nodes.eliminate_dead_code()


def _is_composite(target: Any) -> bool:
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return isinstance(target, torch._ops.OpOverload) and target.has_kernel_for_dispatch_key(key)


def _decompose(nodes: fx.Graph, node: fx.Node, table: Mapping[Any, Callable[..., Any]]) -> None:
    operands = node.all_input_nodes
    target: Any = node.target

    def call(*values: Any) -> Any:
        found = dict(zip(operands, values, strict=True))
        args, kwargs = map_arg((node.args, dict(node.kwargs)), found.__getitem__)  # type: ignore[arg-type]
        return target(*args, **kwargs)

    traced = make_fx(call, dict(table))(*(operand.meta["val"] for operand in operands)).graph
    inputs = [n for n in traced.nodes if n.op == "placeholder"]
    for made in traced.nodes:
        made.meta = {"val": made.meta.get("val"), **{k: v for k, v in node.meta.items() if k in ORIGIN}}
    with nodes.inserting_before(node):
        result = nodes.graph_copy(traced, dict(zip(inputs, operands, strict=True)))
    node.replace_all_uses_with(result)  # type: ignore[arg-type]
    nodes.erase_node(node)


def _promote(graph: Graph) -> None:
    """Make the casts explicit that ATen's operations do by themselves, as an operand of another dtype needs."""
    from torch.onnx._internal.fx.passes import type_promotion

    table = type_promotion.TypePromotionTable()
    interpreter = type_promotion._TypePromotionInterpreter(graph.module, table)
    interpreter.env = {node: node.meta["val"] for node in graph.nodes if "val" in node.meta}
    with graph.fake_mode, enable_python_dispatcher(), preserve_node_meta():
        for node in list(graph.nodes):
            rule = type_promotion.get_type_promotion_rule(node, table)
            if rule is not None:
                with interpreter._set_current_node(node):
                    interpreter._maybe_promote_node(node, rule)


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
            parameter = isinstance(attribute(graph.module, name), torch.nn.Parameter)
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
        state_dict={name: attribute(graph.module, name) for name in read},
        range_constraints={},
        module_call_graph=[call],
    )
