"""What is wrong with a quantization is said in words: the entry, the layer, what was expected and what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import adaptc
from adaptc.errors import AdaptcError, RefusedError, SpecError, WeightError

NF4 = {"method": "nf4", "target": ["up", "down"], "block_size": 16}
LORA = {"method": "lora", "target": ["up", "down"], "r": 2}
ORDERS = (
    "passes: [insert, fold, quantize]",
    "passes: [quantize, insert, fold, quantize]",
    "passes: [quantize, insert, fold]",
    "adapters: live",
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(20, 32), nn.Linear(32, 48), nn.Linear(48, 32)
        self.head = nn.Linear(32, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.down(torch.tanh(self.up(self.embed(ids)))))


def compiled(model: nn.Module | None = None, calibration: Any = None, **spec: Any) -> Any:
    torch.manual_seed(0)
    ids = torch.randint(0, 20, (2, 5))
    ids[0, 0] = 19
    dynamic = {"ids": {0: "batch", 1: "seq"}}
    model = model or Net()
    return adaptc.compile(
        spec, model=model.eval(), example_inputs=(ids,), dynamic=dynamic, calibration=calibration
    )


def said(kind: type[AdaptcError], **spec: Any) -> str:
    with pytest.raises(kind) as error:
        compiled(**spec)
    return str(error.value)


def test_block_sizes_that_no_kernel_takes() -> None:
    for method, size in (("nf4", 48), ("nf4", 8), ("int4", 48), ("int4", 8)):
        words = said(SpecError, quantize=[{"method": method, "target": "up", "block_size": size}])
        assert f"quantize.0.block_size: {method}: expected a power of two from 16" in words
        assert f"got {size}" in words
        assert "site up (linear 32 -> 48)" in words


def test_a_target_that_matches_nothing() -> None:
    words = said(SpecError, quantize=[{"method": "nf4", "target": "upp"}])
    assert "quantize.0.target: nf4: the target matches no" in words
    assert "near: up" in words


def test_a_layer_in_two_entries() -> None:
    words = said(SpecError, quantize=[NF4, {"method": "int8", "target": "all-linear"}])
    assert "quantize.1.target: int8: quantize.0 quantizes up already" in words
    assert "leave it out of one of them with `exclude`" in words


def test_inputs_that_are_not_there() -> None:
    words = said(SpecError, quantize=[{"method": "gptq", "target": "up"}])
    assert "quantize.0: gptq chooses by the layers' inputs, and there are none" in words
    assert "calibration: rows.jsonl" in words


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"idz": torch.zeros(1, 3, dtype=torch.int64)},
            "row 1 has idz, expected ids: ids: int64[batch, seq]",
        ),
        ({"ids": torch.full((1, 3), 20)}, "row 1: ids holds 20, but the model knows 0 to 19"),
        ({"ids": torch.zeros(3, dtype=torch.int64)}, "row 1: ids has 1 dimensions"),
    ],
)
def test_rows_that_do_not_fit(row: Any, expected: str) -> None:
    words = said(SpecError, quantize=[{"method": "gptq", "target": "up"}], calibration=[row])
    assert "calibration" in words
    assert expected in words or expected.replace("ids: ids:", "ids:") in words


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_weights_that_are_no_numbers(method: str, bad: float, tmp_path: Path) -> None:
    model = Net()
    made = compiled(model=model, quantize=[{"method": method, "target": "up"}])
    with torch.no_grad():
        model.up.weight[3, 4] = bad
    with pytest.raises(WeightError) as error:
        made.emit("onnx", tmp_path / "m.onnx")
    assert f"up.weight contains NaN or infinity (non-finite), which {method} cannot store" in str(error.value)
    assert "`exclude`" in str(error.value)
    assert not (tmp_path / "m.onnx").exists()
    if bad != bad:  # infinity is one behind a tanh
        with pytest.raises(WeightError, match=r"up\.weight contains NaN or infinity"):
            compiled(model=model, quantize=[{"method": method, "target": "up"}])


def test_a_row_of_zeros_is_no_error(tmp_path: Path) -> None:
    model = Net()
    with torch.no_grad():
        model.up.weight[3] = 0
    for method in ("nf4", "int4", "int8", "dynamic-int8"):
        made = compiled(model=model, quantize=[{"method": method, "target": "up"}])
        assert torch.isfinite(made.fold()(torch.randint(0, 20, (1, 2)))).all()


def test_folding_into_bits_says_the_orders(tmp_path: Path) -> None:
    made = compiled(quantize=[NF4], adapt=[LORA])
    assert any("cannot be folded: up is stored as nf4" in note for note in made.plan.notes)
    for fold in (made.fold, lambda: made.emit("onnx", tmp_path / "m.onnx")):
        with pytest.raises(AdaptcError) as error:
            fold()
        assert all(order in str(error.value) for order in ORDERS)
    assert not list(tmp_path.iterdir())
    words = said(
        SpecError, quantize=[NF4], adapt=[LORA], emit=[{"format": "onnx", "path": str(tmp_path / "m")}]
    )
    assert "emit.0.format" in words
    assert all(order in words for order in ORDERS)


def test_what_is_live_would_keep_its_floats(tmp_path: Path) -> None:
    emit = [{"format": "onnx", "path": str(tmp_path / "m"), "adapters": "live"}]
    words = said(SpecError, quantize=[NF4], adapt=[LORA], emit=emit, passes=["insert", "fold", "quantize"])
    assert "emit.0.adapters: the pipeline quantizes after `fold`" in words


def test_a_pipeline_without_quantize() -> None:
    words = said(SpecError, quantize=[NF4], adapt=[LORA], passes=["insert"])
    assert "the pipeline leaves out `quantize`" in words


def test_floats_come_before_products_with_bits() -> None:
    words = said(RefusedError, quantize=[NF4], passes=["quantize", "quantized-products", "dequantize"])
    assert "up.weight, down.weight: matrix products read the codes already" in words
    assert "write `dequantize` before the pass that lowers them" in words


@pytest.mark.parametrize(
    "passes",
    [
        ["quantize", "dequantize"],
        ["quantize", "insert", "dequantize"],
        ["quantize", "insert", "fold", "dequantize"],
        ["quantize", "insert", "fold", "quantize", "dequantize"],
    ],
)
def test_what_bits_cost_is_told_of_floats_too(passes: list[str], tmp_path: Path) -> None:
    """Of layers with an adapter and of those without, wherever in the pipeline floats are made of the bits."""
    adapt = [LORA | {"target": "up"}] if "insert" in passes else []
    made = compiled(quantize=[NF4], adapt=adapt, passes=passes)
    made.emit("onnx", tmp_path / "model.onnx")
    about = json.loads((tmp_path / "manifest.json").read_text())
    (product,) = about["products"].values()
    assert {layer["module"] for layer in product["quantization"]["layers"]} == {"up", "down"}
    assert all(0.01 < layer["weight"] < 0.3 for layer in product["quantization"]["layers"])
    state = made.fold().state_dict()
    assert {"up.weight", "down.weight"} <= set(state)
    assert not [name for name in state if "codes" in name]


def test_kernels_in_a_pipeline() -> None:
    """What they replace is not counted."""
    model = Net().bfloat16()
    made = compiled(
        model,
        quantize=[{"method": "int8", "target": "up"}],
        passes=["quantize", "quantized-products", "torch-kernels"],
    )
    assert "up.weight_codes" not in made.graph.weights
    assert "up.weight_signed" in made.graph.weights


def test_quantize_without_anything_to_quantize() -> None:
    words = said(SpecError, adapt=[LORA], passes=["insert", "fold", "quantize"])
    assert "passes.2: `quantize` runs the entries of `quantize:`, and there are none" in words
    words = said(SpecError, adapt=[LORA], budget={"size": 0.2})
    assert "budget: chooses the bits of the layers that `quantize` names, and there is no `quantize`" in words


def test_what_is_trained_keeps_its_floats(tmp_path: Path) -> None:
    emit = [{"format": "torch", "path": str(tmp_path / "t")}]
    made = compiled(quantize=[NF4], adapt=[LORA], emit=emit, passes=["insert", "fold", "quantize"])
    assert any(note.startswith("emit.0: the trainable module keeps its weights") for note in made.plan.notes)


def test_what_makes_up_for_nothing() -> None:
    words = said(SpecError, adapt=[{**LORA, "init_weights": "loftq"}])
    assert "adapt.0: lora compensates quantization, and up.weight is not quantized here" in words
    assert "passes: [quantize, insert]" in words


def test_what_is_made_up_for_twice_or_in_slices() -> None:
    start = {"init_weights": "loftq"}
    words = said(SpecError, quantize=[NF4], adapt=[{**LORA, **start}, {**LORA, **start, "name": "other"}])
    assert (
        "adapt.1: lora compensates quantization of up.weight, which an earlier entry compensates already"
        in words
    )
    words = said(SpecError, quantize=[NF4], adapt=[{**LORA, "loftq_iter": 2}])
    assert "adapt.0.loftq_iter: lora: only `init_weights: loftq` quantizes again" in words


def test_bits_are_not_untied() -> None:
    words = said(
        SpecError,
        quantize=[{"method": "int8", "target": "embed"}],
        adapt=[{**LORA, "target": "head", "on_alias": "untie"}],
    )
    assert "are read elsewhere too, so it cannot be untied" in words
    assert "passes: [insert, quantize]" in words


def test_a_tied_tensor_is_told() -> None:
    made = compiled(quantize=[{"method": "int8", "target": "embed"}])
    assert any("is also used by head, which read the same bits" in note for note in made.plan.notes)


def test_budgets() -> None:
    both = {"size": 0.3, "error": 0.1}
    for budget in ({}, both):
        assert "expected size or error, such as budget: {error: 0.02}" in said(
            SpecError, quantize=[NF4], budget=budget
        )
    words = said(SpecError, quantize=[{**NF4, "method": "int4"}], budget={"size": 0.01})
    assert "budget: budget.size: the fewest bits take" in words


def test_the_place_in_a_file(cli: Any, write: Any, tmp_path: Path) -> None:
    text = (
        'base: {python: "message_models:build"}\ninputs: {x: "float32[batch, 16]"}\n'
        'quantize:\n  - {method: nf4, target: "*.query", block_size: 40}\nemit: [{format: torch, path: out}]\n'
    )
    path = write(text)
    ran = cli("plan", path)
    assert ran.code == 2
    assert ran.err.startswith(f"{path}:5:"), ran.err
    assert "block_size: nf4: expected a power of two" in ran.err


def test_a_plan_in_json(cli: Any, write: Any) -> None:
    text = (
        'base: {python: "message_models:build"}\ninputs: {x: "float32[batch, 16]"}\n'
        'quantize:\n  - {method: nf4, target: "*.query", block_size: 16}\n'
    )
    ran = cli("plan", write(text), "--json")
    assert not ran.code, ran.err
    (entry,) = json.loads(ran.out)["quantize"]
    assert entry["bits"] == 6.0
    assert 0.03 < entry["expected_errors"]["quantize, insert"] < 0.12
    assert [site["module"] for site in entry["sites"]]
