"""Attention that a model writes out is one operation in ONNX where it is exactly that, and gives what torch gives."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

import adaptc
from adaptc.emit.onnx.attention_forms import with_attention
from adaptc.emit.onnx.evaluate import evaluate
from adaptc.emit.onnx.export import export_onnx
from adaptc.emit.onnx.runtime import onnx_runner
from adaptc.ir.graph import Graph
from tests.families import close, randomise

HEADS, SIZE = 3, 8
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Block(nn.Module):
    """One attention, written out."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend, self.packed = attend, nn.Linear(16, 3 * HEADS * SIZE)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> Any:
        parts = self.packed(x).chunk(3, -1)
        return self.attend(*(p.view(*p.shape[:2], HEADS, SIZE).transpose(1, 2) for p in parts), mask)


def softcapped(q: Any, k: Any, v: Any, mask: Any) -> Any:
    """Gemma 2's."""
    scores = q @ k.transpose(2, 3) * 0.4
    scores = torch.tanh(scores / 5.0) * 5.0 + mask
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v


def scaled(q: Any, k: Any, v: Any, mask: Any) -> Any:
    return (q @ k.transpose(-2, -1) / math.sqrt(SIZE) + mask).softmax(-1) @ v


def unscaled(q: Any, k: Any, v: Any, mask: Any) -> Any:
    """T5's, where the bias is added to the mask by the scores."""
    return ((q @ k.mT + mask) + mask).float().softmax(3).type_as(q) @ v


def filled(q: Any, k: Any, v: Any, mask: Any) -> Any:
    """nanoGPT's."""
    return ((q * 0.3) @ k.transpose(-2, -1)).masked_fill(mask < -100, float("-inf")).softmax(-1) @ v


def no_mask(q: Any, k: Any, v: Any, mask: Any) -> Any:
    return (q @ k.transpose(-2, -1)).softmax(-1) @ (v + mask.mean())


def by_letters(q: Any, k: Any, v: Any, mask: Any) -> Any:
    """Heads behind tokens, and a choice in the place of a mask."""
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(SIZE)
    shares = torch.where(mask > -100, scores, torch.tensor(-1e9)).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", shares, v)


def chosen_otherwise(q: Any, k: Any, v: Any, mask: Any) -> Any:
    """The letters of the features in front, and a number where the condition holds."""
    scores = torch.einsum("bhqd,bhdk->bhqk", q, k.mT)
    return torch.einsum("bhqk,bhkd->bhqd", torch.where(mask < -100, float("-inf"), scores).softmax(-1), v)


EXACT: dict[str, tuple[Attend, float]] = {
    "by letters": (by_letters, 0.0),
    "chosen otherwise": (chosen_otherwise, 0.0),
    "softcapped": (softcapped, 5.0),
    "scaled": (scaled, 0.0),
    "unscaled": (unscaled, 0.0),
    "filled": (filled, 0.0),
    "no mask": (no_mask, 0.0),
}


def other_axis(q: Any, k: Any, v: Any, mask: Any) -> Any:
    return (q @ k.transpose(-2, -1) + mask).softmax(2) @ v


def masked_behind(q: Any, k: Any, v: Any, mask: Any) -> Any:
    return ((q @ k.transpose(-2, -1)).softmax(-1) * (mask > 0)) @ v


def masked_before_scaled(q: Any, k: Any, v: Any, mask: Any) -> Any:
    return ((q @ k.transpose(-2, -1) + mask) * 0.3).softmax(-1) @ v


def masked_before_capped(q: Any, k: Any, v: Any, mask: Any) -> Any:
    return (torch.tanh((q @ k.transpose(-2, -1) + mask) / 5.0) * 5.0).softmax(-1) @ v


def capped_by_another(q: Any, k: Any, v: Any, mask: Any) -> Any:
    return (torch.tanh((q @ k.transpose(-2, -1)) / 5.0) * 4.0 + mask).softmax(-1) @ v


def softly_filled(q: Any, k: Any, v: Any, mask: Any) -> Any:
    return (q @ k.transpose(-2, -1)).masked_fill(mask < 0, -3.0).softmax(-1) @ v


def multiplied(q: Any, k: Any, v: Any, mask: Any) -> Any:
    return ((q @ k.transpose(-2, -1)) * mask).softmax(-1) @ v


def given(q: Any, k: Any, v: Any, mask: Any) -> Any:
    shares = (q @ k.transpose(-2, -1) + mask).softmax(-1)
    return shares @ v, shares


def subtracted(q: Any, k: Any, v: Any, mask: Any) -> Any:
    scores = q @ k.transpose(-2, -1)
    return (scores - scores.mean(-1, keepdim=True) + mask).softmax(-1) @ v


def queries_behind(q: Any, k: Any, v: Any, mask: Any) -> Any:
    scores = torch.einsum("bhkd,bhqd->bhqk", k, q)
    return torch.einsum("bhqk,bhkd->bhqd", (scores + mask).softmax(-1), v)


def over_heads_too(q: Any, k: Any, v: Any, mask: Any) -> Any:
    return torch.einsum("bhqk,bhkd->bqd", torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1), v) + mask.mean()


def chosen_among_scores(q: Any, k: Any, v: Any, mask: Any) -> Any:
    return torch.where(mask > -100, q @ k.mT, mask).softmax(-1) @ v


NEAR: dict[str, tuple[Attend, str]] = {
    "queries behind keys": (queries_behind, "its products are no matrix products of heads"),
    "a sum over heads": (over_heads_too, "its products are no matrix products of heads"),
    "a choice among tensors": (chosen_among_scores, "its scores are changed by where"),
    "another axis": (other_axis, "its softmax is not along the keys"),
    "mask behind the softmax": (masked_behind, "its shares are changed by mul behind the softmax"),
    "mask before the scale": (masked_before_scaled, "changed before they are scaled or capped, by add"),
    "mask before the cap": (masked_before_capped, "changed before they are scaled or capped, by add"),
    "another cap": (capped_by_another, "its scores are changed by tanh"),
    "a fill that hides nothing": (softly_filled, "its scores are changed by masked_fill"),
    "a mask that multiplies": (multiplied, "its scores are changed by mul"),
    "shares that are given too": (given, "its shares are read elsewhere too"),
    "a mean taken off": (subtracted, "its scores are changed by add"),
}


def tensors() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, mask = torch.randn(2, 5, 16, generator=generator), torch.randn(2, 1, 5, 5, generator=generator) * 2
    return x, mask.masked_fill(torch.ones(5, 5).triu(1).bool(), -1e4)


def graph_of(model: nn.Module) -> Graph:
    compiled = adaptc.compile(
        {}, model=model, example_inputs=tensors(), dynamic={"x": {0: "batch"}, "mask": {0: "batch"}}
    )
    return evaluate(compiled.folded_graph())


def compared(attend: Attend, path: Path) -> dict[str, Any]:
    """Write a block with ONNX's Attention, and hold it against torch; gives the report on its attention."""
    model = randomise(Block(attend)).eval()
    graph, report = with_attention(graph_of(model), "standard")
    export_onnx(graph, path)
    with torch.no_grad():
        want = model(*tensors())
    results = want if isinstance(want, tuple) else (want,)
    got = onnx_runner(path)(dict(zip(("x", "mask"), tensors(), strict=True)))
    for a, b in zip(got, results, strict=True):
        close(a, b)
    return report


@pytest.mark.parametrize("name", EXACT)
def test_what_is_exactly_attention_is_one_operation(tmp_path: Path, name: str) -> None:
    attend, cap = EXACT[name]
    report = compared(attend, tmp_path / "block.onnx")
    assert (report["why"], report["standard"], report["plain"]) == ([], 1, 0)
    nodes = [n for n in onnx.load(tmp_path / "block.onnx").graph.node if n.op_type == "Attention"]
    assert len(nodes) == 1
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in nodes[0].attribute}
    assert attributes.get("softcap", 0.0) == cap


@pytest.mark.parametrize("name", NEAR)
def test_near_misses_stay_as_they_are(tmp_path: Path, name: str) -> None:
    attend, why = NEAR[name]
    report = compared(attend, tmp_path / "block.onnx")
    assert (report["standard"], report["plain"]) == (0, 1)
    assert why in report["why"][0]
    assert "test_written_attention.py:" in report["why"][0]
    assert not [n for n in onnx.load(tmp_path / "block.onnx").graph.node if n.op_type == "Attention"]


def test_dropout_of_the_shares_is_no_part_of_a_program(tmp_path: Path) -> None:
    """A program only evaluates: what drops shares in training is exactly attention in it."""
    drop = nn.Dropout(0.5)

    def dropped(q: Any, k: Any, v: Any, mask: Any) -> Any:
        return drop((q @ k.transpose(-2, -1) + mask).softmax(-1)) @ v

    drop.eval()
    report = compared(dropped, tmp_path / "block.onnx")
    assert (report["why"], report["standard"]) == ([], 1)
