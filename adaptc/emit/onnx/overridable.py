"""Weights that a program has, and that a call may replace: initializers that are inputs too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from adaptc.errors import AdaptcError

if TYPE_CHECKING:
    import torch

Dims = Mapping[str, Sequence[int | str]]
"""Name of a weight -> its sizes; a text is the name of a size that may vary, and is 0 in the weight that is stored."""


def make_overridable(model: Any, dims: Dims) -> None:
    """Let weights of a program, or inputs of it, be inputs that may be left out, in place.

    What ONNX Runtime knows of shapes below a weight whose size may vary must be forgotten already. A bfloat16 weight
    becomes float32: no array has that type.

    Raises:
        AdaptcError: the program does not read such a weight by its name.
    """
    import onnx_ir as ir

    inputs = {value.name: value for value in model.graph.inputs}
    for name, sizes in dims.items():
        value = model.graph.initializers.get(name) or inputs.get(name)
        if value is None:
            raise AdaptcError(f"{name} is no weight of the ONNX program, so no adapter can replace it")
        narrow = value.dtype == ir.DataType.BFLOAT16
        dtype = ir.DataType.FLOAT if narrow else value.dtype
        if any(isinstance(size, str) for size in sizes):
            value.const_value = _empty([0 if isinstance(size, str) else size for size in sizes], dtype, name)
        elif narrow:
            value.const_value = _widened(value.const_value, name)
        value.shape = ir.Shape(sizes)
        value.type = ir.TensorType(dtype)
        if name in inputs:
            model.graph.initializers.add(value)
        else:
            model.graph.inputs.append(value)


def declare_unread(model: Any, unread: Mapping[str, tuple[int, torch.dtype]]) -> None:
    """Let a program take tensors that it does not read, in place: an adapter has them for a program beside it.

    ONNX Runtime refuses an adapter with a tensor that a program does not take.

    Args:
        model: the program.
        unread: name -> how many axes, and the dtype; bfloat16 is given as float32.
    """
    import onnx_ir as ir
    from torch.onnx._internal.exporter._core import torch_dtype_to_onnx_dtype

    for name, (axes, dtype) in unread.items():
        kind = torch_dtype_to_onnx_dtype(dtype)
        kind = ir.DataType.FLOAT if kind == ir.DataType.BFLOAT16 else kind
        shape = ir.Shape([f"{name}.{axis}" for axis in range(axes)])
        tensor = _empty([0] * axes, kind, name)
        value = ir.Value(name=name, shape=shape, type=ir.TensorType(kind), const_value=tensor)
        model.graph.register_initializer(value)
        model.graph.inputs.append(value)


def _empty(shape: Sequence[int], dtype: Any, name: str) -> Any:
    """A tensor without numbers."""
    import numpy as np
    import onnx_ir as ir

    return ir.tensor(np.zeros(shape, dtype.numpy()), name=name)


def _widened(tensor: Any, name: str) -> Any:
    """A bfloat16 tensor as float32, read when the file is written."""
    import onnx_ir as ir

    def load() -> Any:
        return ir.tensor(tensor.numpy().astype("float32"), name=name)

    return ir.LazyTensor(load, dtype=ir.DataType.FLOAT, shape=tensor.shape, name=name, cache=False)
