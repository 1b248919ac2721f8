"""Inputs and outputs of an ONNX program, where a model's own are special."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import adaptc
from adaptc.emit.onnx.runtime import onnx_runner
from tests.families import randomise
from tests.small_models import LORA, Calls, compiled, near


class SameTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        y = self.up(x)
        return {"linear": y, "again": y, "x": x, "none": None}


def test_outputs_that_are_one_tensor_keep_their_names(tmp_path: Path) -> None:
    made = compiled(randomise(SameTwice()), [{"method": "lora", "target": "up", "r": 2}], torch.randn(4, 6))
    made.emit("onnx", tmp_path / "m.onnx")
    session = onnx_runner(tmp_path / "m.onnx")
    x = torch.randn(3, 6)
    first, second, third = session({"x": x})
    assert torch.equal(first, second)
    assert torch.equal(third, x)
    from adaptc.emit.onnx.runtime import open_session

    names = [value.name for value in open_session(tmp_path / "m.onnx").get_outputs()]
    assert names == ["linear", "again", "x_output"]


def test_a_size_among_the_outputs_does_not_reach_onnx(tmp_path: Path) -> None:
    model, x = Calls(lambda m, x: (m.l(x), x.shape[0]), l=nn.Linear(6, 4)), torch.randn(3, 6)
    made = compiled(model, [{**LORA, "target": "l"}], x)
    made.emit("onnx", tmp_path / "m.onnx")
    (found,) = onnx_runner(tmp_path / "m.onnx")({"x": x})
    assert near(found, model(x)[0])


def test_a_number_less_a_mask_of_integers_is_a_float(tmp_path: Path) -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        mask = (x[:, 0] > 0).long()
        return m.l(x) * (1.0 - mask)[:, None] + torch.rsub(mask, 0.25, alpha=3)[:, None]

    x = torch.randn(4, 6)
    x[:, 0] = torch.tensor([1.0, -1.0, 2.0, -2.0])
    model = Calls(forward, l=nn.Linear(6, 4))
    made = compiled(model, [{**LORA, "target": "l"}], x)
    made.emit("onnx", tmp_path / "m.onnx")
    (got,) = onnx_runner(tmp_path / "m.onnx")({"x": x})
    assert near(got, model(x))


def test_labels_that_make_more_than_a_loss_stay(tmp_path: Path) -> None:
    class Generator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.g, self.table = nn.Linear(6, 4), nn.Linear(6, 4), nn.Embedding(5, 6)

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            image = self.f(x + self.table(labels))
            return {"loss": image.square().mean(), "image": image, "features": self.g(x)}

    model, feeds = Generator(), {"x": torch.randn(3, 6), "labels": torch.tensor([1, 4, 2])}
    made = adaptc.compile(
        {"adapt": [{**LORA, "target": "f"}]},
        model=model,
        example_inputs=feeds,
        dynamic={"x": {0: "batch"}, "labels": {0: "batch"}},
    )
    made.emit("onnx", tmp_path / "m.onnx")
    found = onnx_runner(tmp_path / "m.onnx")(feeds)
    assert [near(a, model(**feeds)[name]) for a, name in zip(found, ("image", "features"), strict=True)] == [
        True
    ] * 2


@pytest.mark.slow
def test_a_query_that_a_float_mask_keeps_from_all_keys_is_zero(tmp_path: Path) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.l = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 6)

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.l(self.a(x, x, x, key_padding_mask=mask == 0, need_weights=False)[0])

    x, mask = torch.randn(3, 5, 6), torch.ones(3, 5, dtype=torch.long)
    made = adaptc.compile(
        {"adapt": [{**LORA, "target": "l"}]},
        model=Attention(),
        example_inputs=(x, mask),
        dynamic={"x": {0: "batch"}, "mask": {0: "batch"}},
    )
    made.emit("onnx", tmp_path / "m.onnx")
    mask[0] = 0
    want = made.module.eval()(x, mask)
    assert torch.isfinite(want).all()
    assert near(onnx_runner(tmp_path / "m.onnx")({"x": x, "mask": mask})[0], want.detach())
