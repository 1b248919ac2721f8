"""Programs as text, and their tensors: torch modules, ONNX files, checkpoints and what lies beside them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx_ir
import torch
from safetensors.torch import load_file
from torch import fx, nn

import adaptc

VOLATILE = re.compile(
    r"^(sha256|sites\..*|spec\..*|versions\..*|.*\.(seconds|sha256|bytes|reference)(\..*)?"
    r"|.*(proofs?|quantization|rounding)\..*)$"
)
"""What a manifest says besides: times and hashes, what was measured, and what the plan has too."""


def product_texts(name: str, path: Path) -> Iterator[tuple[str, str | Mapping[str, torch.Tensor]]]:
    """What a product holds: its programs and configurations as text, its tensors by name.

    Args:
        name: what the product is called in the record.
        path: the file or folder that was written.
    """
    folder = path if path.is_dir() else path.parent
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    yield f"{name} files", "\n".join(str(file.relative_to(folder)) for file in files)
    for file in files:
        label = f"{name} {file.relative_to(folder)}"
        if file.suffix == ".pt2":
            module = adaptc.load(folder)
            yield label, module_text(module)
            yield f"{label} tensors", module_tensors(module)
        elif file.suffix == ".onnx":
            model = onnx_ir.load(file)
            yield label, onnx_text(model)
            yield f"{label} tensors", onnx_tensors(model)
        elif file.suffix == ".safetensors":
            yield f"{label} tensors", load_file(file)
        elif file.name == "manifest.json":
            yield label, manifest_text(json.loads(file.read_text()))
        elif file.name in ("config.json", "adapter_config.json"):
            yield label, file.read_text()


def module_text(module: fx.GraphModule) -> str:
    """A module's graph, a line a node: result, operation, operands, shape."""
    return "\n".join(_node(node) for node in module.graph.nodes)


def module_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer by each of its names."""
    tensors = dict(module.named_parameters(remove_duplicate=False))
    return {**tensors, **dict(module.named_buffers(remove_duplicate=False))}


def onnx_text(model: onnx_ir.Model) -> str:
    """A program's inputs, metadata, functions and nodes, a line each."""
    opsets = ", ".join(f"{domain or 'onnx'} {version}" for domain, version in sorted(model.opset_imports.items()))
    lines = [f"opsets {opsets}"]
    lines += [f"{key}: {value}" for key, value in sorted(model.metadata_props.items()) if "sha256" not in key]
    for function in model.functions.values():
        lines += [f"function {function.name}", *_onnx_nodes(function, "  ")]
    return "\n".join([*lines, *_onnx_nodes(model.graph, "")])


def onnx_tensors(model: onnx_ir.Model) -> dict[str, torch.Tensor]:
    """Every initializer, and every tensor of an attribute that is too large to be shown."""
    tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
    for node in model.graph.all_nodes():
        for key, attribute in node.attributes.items():
            if attribute.type == onnx_ir.AttributeType.TENSOR and attribute.as_tensor().size > 8:
                tensors[f"{node.outputs[0].name}.{key}"] = attribute.as_tensor()
    return {name: _as_torch(tensor) for name, tensor in tensors.items() if tensor is not None}


def plain_text(value: Any, path: str = "") -> Iterator[str]:
    """Plain data, a line each value or mapping of plain values; numbers to six digits."""
    nested = isinstance(value, dict | list) and any(isinstance(v, dict | list) and v for v in _values(value))
    if nested and not (isinstance(value, dict) and all(_flat(v) for v in value.values()) and path):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from plain_text(item, f"{path}.{key}" if path else str(key))
    else:
        yield f"{path} = {json.dumps(_rounded(value), ensure_ascii=False)}"


def manifest_text(manifest: dict[str, Any]) -> str:
    """What a manifest says, but for what differs from run to run and what stands in the plan too."""
    return "\n".join(_leaves(manifest))


def _leaves(value: Any, path: str = "") -> Iterator[str]:
    if path and VOLATILE.match(path):
        return
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}.{index}")
    else:
        yield f"{path} = {json.dumps(_rounded(value), ensure_ascii=False)}"


def _values(value: dict[str, Any] | list[Any]) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value


def _flat(value: Any) -> bool:
    return not isinstance(value, dict) and not (
        isinstance(value, list) and any(isinstance(item, dict) for item in value)
    )


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def _node(node: fx.Node) -> str:
    value = node.meta.get("val")
    shape = ""
    if isinstance(value, torch.Tensor):
        shape = f"  {str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
    target = node.target if isinstance(node.target, str) else _name(node.target)
    operands = [_operand(a) for a in node.args] + [f"{k}={_operand(v)}" for k, v in node.kwargs.items()]
    return f"%{node.name} = {node.op} {target}({', '.join(operands)}){shape}"


def _name(target: Any) -> str:
    return str(target) if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", str(target))


def _operand(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_operand, value))}]"
    return f"%{value.name}" if isinstance(value, fx.Node) else str(value)


def _onnx_nodes(graph: Any, indent: str) -> Iterator[str]:
    yield f"{indent}inputs {', '.join(map(_onnx_value, graph.inputs))}"
    for node in graph:
        operands = ", ".join("" if value is None else str(value.name) for value in node.inputs)
        results = ", ".join(str(value.name) for value in node.outputs)
        attributes = sorted(node.attributes.items())
        shown = [f"{k}={_onnx_attribute(a)}" for k, a in attributes if a.type not in GRAPHS]
        domain = f"{node.domain}." if node.domain else ""
        yield f"{indent}{results} = {domain}{node.op_type}({operands}) {' '.join(shown)}".rstrip()
        for key, attribute in attributes:
            if attribute.type in GRAPHS:
                graphs = attribute.as_graphs() if attribute.type == onnx_ir.AttributeType.GRAPHS else [attribute.value]
                for inner in graphs:
                    yield f"{indent}  {key}:"
                    yield from _onnx_nodes(inner, indent + "    ")
    yield f"{indent}outputs {', '.join(map(_onnx_value, graph.outputs))}"


GRAPHS = (onnx_ir.AttributeType.GRAPH, onnx_ir.AttributeType.GRAPHS)


def _onnx_value(value: onnx_ir.Value) -> str:
    return f"{value.name} {value.type} {value.shape}"


def _onnx_attribute(attribute: onnx_ir.Attr) -> str:
    if attribute.type != onnx_ir.AttributeType.TENSOR:
        return str(attribute.value)
    tensor = attribute.as_tensor()
    if tensor.size > 8:
        return f"{tensor.dtype.name}{list(tensor.shape)}"
    return f"{tensor.dtype.name}{tensor.numpy().tolist()}"


def _as_torch(tensor: onnx_ir.TensorProtocol) -> torch.Tensor:
    """The tensor in its own dtype where numpy and torch have it; what they lack, such as 4 bits, as its bytes."""
    array = tensor.numpy()
    try:
        return torch.from_numpy(array.copy())
    except TypeError:
        return torch.frombuffer(bytearray(tensor.tobytes()), dtype=torch.uint8)
