"""Integers in blocks as other libraries store them, laid out as ours."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from adaptc.errors import WeightError
from adaptc.quantization.integer import IntegerBlocks, pack
from adaptc.quantization.packed import PackedMatrix, _check
from adaptc.registry.registry import Registry
from adaptc.weights import Weight


def words_of(tensors: Mapping[str, Weight], module: str) -> tuple[Weight, Weight, Weight] | None:
    """`qweight`, `qzeros` and `scales` of a module; None where it has neither.

    Raises:
        WeightError: one of them is not there, or integers are not in words of 32 bits.
    """
    keys = [f"{module}.{name}" for name in ("qweight", "qzeros", "scales")]
    if not any(key in tensors for key in keys):
        return None
    qweight, qzeros, scales = (needed(tensors, key) for key in keys)
    for key, weight in zip(keys, (qweight, qzeros), strict=False):
        if weight.dtype != torch.int32 or len(weight.shape) != 2:
            raise WeightError(
                f"{key} is {weight.dtype} {list(weight.shape)}; expected a matrix of int32, words of 32 bits"
            )
    return qweight, qzeros, scales


def group_of(about: Mapping[str, Any]) -> int | None:
    """Inputs that share a scale: `group_size`; None for all of them, which is written -1.

    Raises:
        WeightError: it is neither.
    """
    group = number(about, "group_size", 128)
    if group < 1 and group != -1:
        raise WeightError(
            f"config.json: quantization_config.group_size: expected -1 or more than 0, got {group}"
        )
    return None if group == -1 else group


def integer_bits(
    scheme: IntegerBlocks,
    rows: int,
    columns: int,
    codes: Callable[[], Tensor],
    zeros: Callable[[], Tensor],
    scales: Weight,
    module: str,
) -> PackedMatrix:
    """Bits of integers in blocks, packed as `scheme` has them when they are asked for.

    Args:
        scheme: what they stand for.
        rows: outputs of the layer.
        columns: its inputs.
        codes: gives them, one a byte: `(rows, columns)`.
        zeros: gives one a block: `(rows, blocks)`.
        scales: one a block, floats: `(blocks, rows)`.
        module: whose they are, for messages.

    Raises:
        WeightError: there are not as many scales.
    """
    n = scheme.blocks(columns)
    if tuple(scales.shape) != (n, rows):
        raise WeightError(
            f"{module}.scales has shape {list(scales.shape)}, expected {[n, rows]} for blocks of "
            f"{scheme.block_size or columns}: quantization_config.group_size is another checkpoint's"
        )

    def blocks() -> Tensor:
        from torch.nn.functional import pad

        filled = pad(codes(), (0, n * scheme.block(columns) - columns))
        return pack(filled.reshape(rows, n, -1), scheme.bits)

    def ranges() -> Tensor:
        middle = 2 ** (scheme.bits - 1)
        if scheme.symmetric and not (zeros() == middle).all():
            raise WeightError(
                f"{module}.qzeros: the checkpoint calls its codes symmetric, but its zeros are not all {middle}",
                "set quantization_config in config.json right: its `sym` or `zero_point`, or its `checkpoint_format`",
            )
        return scales.load().t().float().contiguous()

    parts = {"codes": blocks, "scales": ranges}
    if not scheme.symmetric:
        parts["zeros"] = lambda: pack(zeros(), scheme.bits)
    return PackedMatrix(scheme, rows, columns, parts, module)


def needed(tensors: Mapping[str, Weight], key: str, shape: tuple[int, ...] | None = None) -> Weight:
    """One of the tensors that a quantized matrix is stored in, of as many numbers as a shape has.

    Raises:
        WeightError: it is missing, or of another size.
    """
    found = tensors.get(key)
    if found is None:
        raise WeightError(f"{key} is missing: the checkpoint is not whole, copy or download it again")
    if shape is not None and math.prod(found.shape) != math.prod(shape):
        raise WeightError(
            f"{key} has shape {list(found.shape)}, expected {list(shape)}; the file and config.json's "
            "quantization_config do not belong together"
        )
    return found


def number(about: Mapping[str, Any], key: str, otherwise: int | None = None) -> int:
    """A whole number of a checkpoint's `quantization_config`.

    Raises:
        WeightError: it is missing, or something else.
    """
    found = about.get(key, otherwise)
    try:
        return int(str(found))
    except ValueError:
        raise WeightError(
            f"config.json: quantization_config.{key}: expected a whole number, got {found!r}"
        ) from None


Reader = Callable[[Mapping[str, Any], str, Mapping[str, Weight]], "PackedMatrix | None"]
"""Given a checkpoint's `quantization_config`, a module's name and the tensors by their keys, the module's weight in
bits, or None where it is stored in floats. Headers are read, and of tensors only what tells the format."""
READERS: Registry[Reader] = Registry("reader", "adaptc.passes.stored", check=_check)
"""Every reader, shipped or of an installed package, by its `quant_method`."""
R = TypeVar("R", bound=Reader)


def stored_by(method: str) -> Callable[[R], R]:
    """Register a reader under the `quant_method` of the checkpoints that it reads.

    Raises:
        DefinitionError: the name is not kebab-case, or another author's.
    """
    return READERS.register(method)
