"""NF4 and FP4 beside bitsandbytes: bits, scales and results are the same, number for number."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adaptc.quantization.codebook import TableBlocks, dynamic_table
from adaptc.quantization.scheme import SCHEMES

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
import bitsandbytes.functional as bnb

NAMES = tuple(sorted(n for n, cls in SCHEMES.items() if issubclass(cls, TableBlocks)))
SHAPES = ((512, 384), (300, 257), (5, 33), (1, 1))


def weights(shape: tuple[int, int], kind: str) -> torch.Tensor:
    W = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.05
    if kind == "zero row":
        W[0] = 0
    if kind == "ties":
        W = (W * 40).round() / 8
    return W


@pytest.mark.parametrize("kind", ["normal", "zero row", "ties"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("block_size", [32, 64, 4096])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits(name: str, shape: tuple[int, int], block_size: int, double: bool, kind: str) -> None:
    scheme: Any = SCHEMES[name](block_size=block_size, double=double)
    W = weights(shape, kind)
    theirs, state = bnb.quantize_4bit(W, blocksize=block_size, quant_type=name, compress_statistics=double)
    ours = scheme.quantize(W)
    assert torch.equal(ours["codes"], theirs.flatten())
    if double:
        assert torch.equal(ours["absmax_codes"], state.absmax)
        assert torch.equal(ours["absmax_scales"], state.state2.absmax)
        assert torch.equal(ours["absmax_offset"], state.offset)
        assert torch.equal(scheme.constants()["nested_table"], state.state2.code)
    else:
        assert torch.equal(ours["absmax"], state.absmax)
    assert torch.equal(scheme.constants()["table"], state.code)
    back = scheme.dequantize(*shape, {**ours, **scheme.constants()})
    if shape[1] % block_size == 0:
        assert torch.equal(back, bnb.dequantize_4bit(theirs, state))
    else:  # its own gets rows wrong that end within a block, on the CPU
        flat = bnb.dequantize_4bit(theirs, _flat(state, shape))
        assert torch.equal(back.flatten(), flat.flatten())


def _flat(state: Any, shape: tuple[int, int]) -> Any:
    """The same state for one row of all numbers."""
    state.shape = torch.Size((1, shape[0] * shape[1]))
    return state


def test_the_table_of_scales() -> None:
    assert torch.equal(dynamic_table(), bnb.create_dynamic_map())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_narrow_weights(name: str, dtype: torch.dtype) -> None:
    W = weights((48, 128), "normal").to(dtype)
    theirs, state = bnb.quantize_4bit(W, blocksize=64, quant_type=name)
    scheme: Any = SCHEMES[name]()
    ours = scheme.quantize(W.float())
    assert torch.equal(ours["codes"], theirs.flatten())
    back = scheme.dequantize(48, 128, {**ours, **scheme.constants()}).to(dtype)
    assert torch.equal(back, bnb.dequantize_4bit(theirs, state))
