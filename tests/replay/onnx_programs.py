"""ONNX programs as text, and their tensors."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir
import torch

SMALL = 8
"""Constants of up to so many values are shown where they are used."""
LEFT_OUT = frozenset({"adaptc.base_sha256", "adaptc.provenance"})
"""Metadata that differs from run to run."""
GRAPHS = (onnx_ir.AttributeType.GRAPH, onnx_ir.AttributeType.GRAPHS)


def onnx_text(model: onnx_ir.Model) -> str:
    """A program's inputs, metadata, functions and nodes, a line each."""
    opsets = ", ".join(
        f"{domain or 'onnx'} {version}" for domain, version in sorted(model.opset_imports.items())
    )
    lines = [f"opsets {opsets}"]
    lines += [f"{key}: {value}" for key, value in sorted(model.metadata_props.items()) if key not in LEFT_OUT]
    for function in model.functions.values():
        lines += [f"function {function.name}", *_onnx_nodes(function, "  ")]
    return "\n".join([*lines, *_onnx_nodes(model.graph, "")])


def onnx_tensors(model: onnx_ir.Model) -> dict[str, torch.Tensor]:
    """Every tensor of a program that its text does not show."""
    tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
    for node in model.graph.all_nodes():
        for key, attribute in node.attributes.items():
            if attribute.type == onnx_ir.AttributeType.TENSOR:
                tensors[f"{node.outputs[0].name}.{key}"] = attribute.as_tensor()
    return {name: _as_torch(t) for name, t in tensors.items() if t is not None and not _is_small(name, t)}


def _onnx_nodes(graph: onnx_ir.Graph | onnx_ir.Function, indent: str) -> Iterator[str]:
    yield f"{indent}inputs {', '.join(map(_onnx_value, graph.inputs))}"
    for node in graph:
        if node.op_type == "Constant" and _constant(node.outputs[0]) is not None:
            continue
        operands = ", ".join(map(_onnx_operand, node.inputs))
        results = ", ".join(str(value.name) for value in node.outputs)
        attributes = sorted(node.attributes.items())
        shown = [f"{k}={_onnx_attribute(a)}" for k, a in attributes if a.type not in GRAPHS]
        domain = f"{node.domain}." if node.domain else ""
        yield f"{indent}{results} = {domain}{node.op_type}({operands}) {' '.join(shown)}".rstrip()
        for key, attribute in attributes:
            if attribute.type in GRAPHS:
                one = attribute.type == onnx_ir.AttributeType.GRAPH
                for inner in [attribute.as_graph()] if one else attribute.as_graphs():
                    yield f"{indent}  {key}:"
                    yield from _onnx_nodes(inner, indent + "    ")
    yield f"{indent}outputs {', '.join(map(_onnx_value, graph.outputs))}"


def _onnx_value(value: onnx_ir.Value) -> str:
    return f"{value.name} {value.type} {value.shape}"


def _onnx_operand(value: onnx_ir.Value | None) -> str:
    if value is None:
        return ""
    return _constant(value) or str(value.name)


def _constant(value: onnx_ir.Value) -> str | None:
    """A small constant that the exporter named, as it is shown where it is used."""
    tensor, node = value.const_value, value.producer()
    if tensor is None and node is not None and node.op_type == "Constant" and "value" in node.attributes:
        tensor = node.attributes["value"].as_tensor()
    if tensor is not None and _is_small(str(value.name), tensor):
        return _numbers(tensor)
    if node is not None and node.op_type == "Constant" and "value" not in node.attributes:
        return str(next(iter(node.attributes.values())).value)
    return None


def _onnx_attribute(attribute: onnx_ir.Attr) -> str:
    return (
        str(attribute.value)
        if attribute.type != onnx_ir.AttributeType.TENSOR
        else _numbers(attribute.as_tensor())
    )


def _numbers(tensor: onnx_ir.TensorProtocol) -> str:
    return f"{tensor.dtype.name}{tensor.numpy().tolist() if tensor.size <= SMALL else list(tensor.shape)}"


def _is_small(name: str, tensor: onnx_ir.TensorProtocol) -> bool:
    return tensor.size <= SMALL and name.startswith("val_")


def _as_torch(tensor: onnx_ir.TensorProtocol) -> torch.Tensor:
    """The tensor in its own dtype where torch has it; what it lacks, such as 4 bits, as bytes."""
    array = tensor.numpy()
    try:
        return torch.from_numpy(array.copy())
    except TypeError:
        return torch.frombuffer(bytearray(tensor.tobytes()), dtype=torch.uint8)
