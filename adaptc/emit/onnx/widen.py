"""bfloat16 programs for runtimes without bfloat16 arithmetic: weights in bfloat16, computation in float32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def widen(model: Any) -> None:
    """Let a bfloat16 program compute in float32, in place; its weights stay in bfloat16.

    ONNX Runtime has hardly an operation in bfloat16 on the CPU. Each weight is read through a Cast, which a runtime
    computes once when it loads the program. Constants, casts, inputs and outputs become float32.
    """
    import onnx_ir as ir

    narrow, wide = ir.DataType.BFLOAT16, ir.DataType.FLOAT
    graph = model.graph
    for node in graph.all_nodes():
        for attribute in list(node.attributes.values()):
            if attribute.type == ir.AttributeType.INT and attribute.name in ("to", "dtype"):
                dtype = wide if attribute.as_int() == narrow else attribute.as_int()
                node.attributes[attribute.name] = ir.AttrInt64(attribute.name, int(dtype))
            elif attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == narrow:
                node.attributes[attribute.name] = ir.AttrTensor(attribute.name, _float(attribute.as_tensor()))
        for value in node.outputs:
            _declare(value, narrow, wide)
    for value in (*graph.inputs, *graph.outputs):
        _declare(value, narrow, wide)
    order = {node: index for index, node in enumerate(graph)}
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
        graph.insert_before(_first([user for user, _ in users], graph, order), cast)


def _first(users: Sequence[Any], graph: Any, order: Mapping[Any, int]) -> Any:
    """The user that runs first, so that a program run part by part holds no weight before it is needed."""
    inner = any(user not in order for user in users)  # in a branch or a loop
    return graph[0] if inner or not users else min(users, key=order.__getitem__)


def _declare(value: Any, narrow: Any, wide: Any) -> None:
    """Declare a value of the dtype `narrow` as `wide`."""
    if value.type is not None and value.type.dtype == narrow:
        value.type = type(value.type)(wide)


def _float(tensor: Any) -> Any:
    """A tensor in float32."""
    import onnx_ir as ir

    return ir.tensor(tensor.numpy().astype("float32"), name=tensor.name)
