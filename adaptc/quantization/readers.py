"""What the readers of `passes/stored/` share: the tensors of a module, and integers packed as other libraries do."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from adaptc.errors import DefinitionError, WeightError
from adaptc.quantization.integer import IntegerBlocks, pack
from adaptc.quantization.packed import PackedMatrix
from adaptc.registry.author import Author
from adaptc.registry.registry import Registry
from adaptc.weights import Weight


def packed_tensors(tensors: Mapping[str, Weight], module: str) -> tuple[Weight, Weight, Weight] | None:
    """`qweight`, `qzeros` and `scales` of a module; None where it has none of them.

    Raises:
        WeightError: one of them is missing, or the first two are not matrices of int32.
    """
    keys = [f"{module}.{name}" for name in ("qweight", "qzeros", "scales")]
    if not any(key in tensors for key in keys):
        return None
    qweight, qzeros, scales = (required_tensor(tensors, key) for key in keys)
    for key, weight in zip(keys, (qweight, qzeros), strict=False):
        if weight.dtype != torch.int32 or len(weight.shape) != 2:
            raise WeightError(
                f"{key} is {weight.dtype} {list(weight.shape)}; expected a matrix of int32, words of 32 bits"
            )
    return qweight, qzeros, scales


def group_size(config: Mapping[str, object]) -> int | None:
    """How many inputs share a scale: `group_size`, 128 by default; None where all do, which is written -1.

    Raises:
        WeightError: it is neither -1 nor more than 0.
    """
    group = integer_option(config, "group_size", 128)
    if group < 1 and group != -1:
        raise WeightError(
            f"config.json: quantization_config.group_size: expected -1 or more than 0, got {group}"
        )
    return None if group == -1 else group


def integer_matrix(
    scheme: IntegerBlocks,
    rows: int,
    columns: int,
    codes: Callable[[], Tensor],
    zeros: Callable[[], Tensor],
    scales: Weight,
    module: str,
) -> PackedMatrix:
    """A matrix of integers in blocks, packed as `scheme` packs it when its tensors are read.

    Args:
        scheme: the scheme that dequantizes it.
        rows: outputs of the layer.
        columns: inputs of the layer.
        codes: gives the codes, one a byte: `(rows, columns)`.
        zeros: gives the zero of each block: `(rows, blocks)`.
        scales: the scale of each block, floats: `(blocks, rows)`.
        module: the module it belongs to, for messages.

    Raises:
        WeightError: the number of scales is not the number of blocks.
    """
    n = scheme.blocks(columns)
    if tuple(scales.shape) != (n, rows):
        raise WeightError(
            f"{module}.scales has shape {list(scales.shape)}, expected {[n, rows]} for blocks of "
            f"{scheme.block_size or columns}: quantization_config.group_size is another checkpoint's"
        )

    def packed_codes() -> Tensor:
        filled = pad(codes(), (0, n * scheme.block(columns) - columns))
        return pack(filled.reshape(rows, n, -1), scheme.bits)

    def checked_scales() -> Tensor:
        middle = 2 ** (scheme.bits - 1)
        if scheme.symmetric and not (zeros() == middle).all():
            raise WeightError(
                f"{module}.qzeros: the checkpoint calls its codes symmetric, but its zeros are not all {middle}",
                "set quantization_config in config.json right: its `sym` or `zero_point`, or its `checkpoint_format`",
            )
        return scales.load().t().float().contiguous()

    parts = {"codes": packed_codes, "scales": checked_scales}
    if not scheme.symmetric:
        parts["zeros"] = lambda: pack(zeros(), scheme.bits)
    return PackedMatrix(scheme, rows, columns, parts, module)


def required_tensor(tensors: Mapping[str, Weight], key: str, shape: tuple[int, ...] | None = None) -> Weight:
    """The tensor of a key, which must be there; `shape` says how many numbers it has, however they are arranged.

    Raises:
        WeightError: it is missing, or has another size.
    """
    tensor = tensors.get(key)
    if tensor is None:
        raise WeightError(f"{key} is missing: the checkpoint is not whole, copy or download it again")
    if shape is not None and math.prod(tensor.shape) != math.prod(shape):
        raise WeightError(
            f"{key} has shape {list(tensor.shape)}, expected {list(shape)}; the file and config.json's "
            "quantization_config do not belong together"
        )
    return tensor


def integer_option(config: Mapping[str, object], key: str, default: int | None = None) -> int:
    """A whole number of a checkpoint's `quantization_config`.

    Raises:
        WeightError: it is missing and has no default, or is something else.
    """
    value = config.get(key, default)
    try:
        return int(str(value))
    except ValueError:
        raise WeightError(
            f"config.json: quantization_config.{key}: expected a whole number, got {value!r}"
        ) from None


def _check(name: str, reader: Any, author: Author) -> None:
    try:
        inspect.signature(reader).bind("config", "module", "tensors")
    except TypeError as error:
        raise DefinitionError(
            f"reader {name!r} cannot be called as {reader.__name__}(config, module, tensors): {error}",
            author.place,
        ) from error


Reader = Callable[[Mapping[str, Any], str, Mapping[str, Weight]], "PackedMatrix | None"]
"""Called with a checkpoint's `quantization_config`, the name of a module and the checkpoint's tensors by their keys;
gives the packed matrix of the module's weight, or None where the weight is stored in floats. It reads headers, and no
tensor but those that say which format this is."""
READERS: Registry[Reader] = Registry("reader", "adaptc.passes.stored", check=_check)
"""Every reader, shipped or of an installed package, by its `quant_method`."""
R = TypeVar("R", bound=Reader)


def stored_by(method: str) -> Callable[[R], R]:
    """Register a reader under the `quant_method` of the checkpoints that it reads.

    Raises:
        DefinitionError: the name is not kebab-case, or another author's.
    """
    return READERS.register(method)
