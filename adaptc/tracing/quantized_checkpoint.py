"""The weights of a Hugging Face checkpoint that another library has quantized, kept in its packed format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from adaptc.checkpoints.huggingface_weights import CONFIG, is_converted, spellings, stored_tensors
from adaptc.errors import WeightError
from adaptc.quantization.packed import PackedMatrix, PackedWeight
from adaptc.quantization.readers import READERS

WEIGHT = ".weight"


def packed_weights(
    model: nn.Module, directory: Path, quantization: Mapping[str, object]
) -> dict[str, PackedWeight]:
    """Find the weights that a checkpoint stores in another library's packed format.

    Args:
        model: the model; its parameters are fake.
        directory: the checkpoint.
        quantization: the `quantization_config` of its configuration.

    Returns:
        The model's name of a weight -> the packed weight.

    Raises:
        WeightError: adaptc does not read that library's format, or a stored matrix does not fit the model.
    """
    method = str(quantization.get("quant_method"))
    if method not in READERS:
        raise WeightError(
            f"{directory} is quantized by {method!r}, which adaptc does not read; it reads {', '.join(sorted(READERS))}"
        )
    stored = stored_tensors(directory)
    if is_converted(model, stored):
        raise WeightError(
            f"{directory} is quantized by {method}, and transformers converts its tensors as it loads them, "
            "which adaptc cannot follow in bits",
            "start from the float checkpoint, and let `quantize` store it in few bits",
        )
    read = READERS[method]
    packed: dict[str, PackedWeight] = {}
    for name, keys in spellings(model).items():
        for key in keys if name.endswith(WEIGHT) else ():
            matrix = read(quantization, key.removesuffix(WEIGHT), stored)
            if matrix is not None:
                packed[name] = _packed(model, name, matrix)
                break
    return packed


def _packed(model: nn.Module, name: str, matrix: PackedMatrix) -> PackedWeight:
    parameter = model.get_parameter(name)
    shape = tuple(parameter.shape)
    module = model.get_submodule(name.removesuffix(WEIGHT))
    flipped = type(module).__name__ == "Conv1D"  # transformers' own, (in, out); libraries pack its transpose
    size = (matrix.rows, matrix.columns)
    if shape != (size[::-1] if flipped else size):
        raise WeightError(
            f"{name} is stored as a matrix {list(size)}, but {CONFIG} describes {list(shape)}; the files and the "
            "configuration belong to different models"
        )
    refused = matrix.scheme.refuses(*size)
    if refused:
        raise WeightError(
            f"{name} is stored as {matrix.scheme.text}: {'.'.join(refused.option)}: {refused.reason}"
        )
    return PackedWeight(matrix, shape, parameter.dtype, flipped)
