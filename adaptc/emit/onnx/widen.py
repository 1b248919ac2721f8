"""bfloat16 programs for runtimes without bfloat16 arithmetic: stored in bfloat16, computed in float32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch


def widen(model: Any) -> None:
    """Let a program compute in float32 what it computes in bfloat16, in place; its weights stay as they are stored.

    ONNX Runtime's CPU has hardly an operation in bfloat16. Each weight gets a Cast behind it, which a runtime does
    once when it loads the program; constants and casts within the program become float32, inputs and outputs too.
    """
    import onnx_ir as ir

    narrow, wide = ir.DataType.BFLOAT16, ir.DataType.FLOAT
    graph = model.graph
    for node in graph.all_nodes():
        for attribute in list(node.attributes.values()):
            if attribute.type == ir.AttributeType.INT and attribute.name in ("to", "dtype"):
                kind = wide if attribute.as_int() == narrow else attribute.as_int()
                node.attributes[attribute.name] = ir.AttrInt64(attribute.name, int(kind))
            elif attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == narrow:
                node.attributes[attribute.name] = ir.AttrTensor(attribute.name, _float(attribute.as_tensor()))
        for value in node.outputs:
            _declare(value, narrow, wide)
    for value in (*graph.inputs, *graph.outputs):
        _declare(value, narrow, wide)
    places = {node: place for place, node in enumerate(graph)}
    for value in [v for v in graph.initializers.values() if v.const_value.dtype == narrow]:
        users = list(value.uses())
        cast = ir.node("Cast", [value], {"to": wide.value}, name=f"{value.name}.float32")
        cast.outputs[0].name = f"{value.name}.float32"
        cast.outputs[0].type = ir.TensorType(wide)
        cast.outputs[0].shape = value.shape
        for user, index in users:
            user.replace_input_with(index, cast.outputs[0])
        for index, output in enumerate(graph.outputs):
            if output is value:
                graph.outputs[index] = cast.outputs[0]
        graph.insert_before(_first([user for user, _ in users], graph, places), cast)


def _first(users: Sequence[Any], graph: Any, places: Mapping[Any, int]) -> Any:
    """Which operation comes first: what runs the program piece by piece holds nothing before it is needed."""
    inner = any(user not in places for user in users)  # in a branch or a loop
    return graph[0] if inner or not users else min(users, key=places.__getitem__)


def _declare(value: Any, narrow: Any, wide: Any) -> None:
    if value.type is not None and value.type.dtype == narrow:
        value.type = type(value.type)(wide)


def _float(tensor: Any) -> Any:
    import onnx_ir as ir

    values = torch.from_numpy(tensor.numpy().astype("float32"))
    return ir.tensor(values.numpy(), name=tensor.name)
