"""What proofs run on: a person's own inputs first, then random ones that the model takes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import adaptc
from adaptc.cli.inspection import verify
from adaptc.errors import ProofError, TraceError
from tests.families import marked, perturb, randomise

LORA = {"method": "lora", "target": "l", "r": 2}


class Layers(nn.Module):
    def __init__(self, inner: int = 6, outer: int = 6) -> None:
        super().__init__()
        self.l, self.o = nn.Linear(6, inner), nn.Linear(outer, 2)


class Padded(nn.Module):
    """torch's own convention: True where a token is padding."""

    def __init__(self, nested: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
        self.e = nn.TransformerEncoder(layer, 1, enable_nested_tensor=nested)
        self.l = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor, src_key_padding_mask: torch.Tensor) -> torch.Tensor:
        return self.l(self.e(x, src_key_padding_mask=src_key_padding_mask))


class Pooled(Layers):
    """The mean of the tokens that a mask takes: not a number where it takes none."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.o((self.l(x) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


class Deviation(Layers):
    """Statistics over time: one frame has no deviation."""

    def __init__(self) -> None:
        super().__init__(outer=12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.l(x)
        # a deviation by hand: torch warns of one frame by itself
        spread = ((h - h.mean(1, keepdim=True)) ** 2).sum(1) / (h.shape[1] - 1)
        return self.o(torch.cat([h.mean(1), spread.sqrt()], -1))


class Neighbours(Layers):
    def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        h = self.l(x)
        return self.o(h + torch.zeros_like(h).index_add(0, edges[1], h[edges[0]]))


class Logarithm(Layers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(self.l(x.log()))


class Root(Layers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(self.l((1 - x).sqrt()))


class Speech(nn.Module):
    """A convolutional front end: 40 samples are the least it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (
            nn.Conv1d(1, 8, 10, 5),
            nn.Conv1d(8, 8, 3, 2),
            nn.Conv1d(8, 8, 3, 2),
        )
        self.l = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.third(self.second(self.first(x[:, None]).relu()).relu()).relu()
        return self.l(y.transpose(1, 2))


class Normed(nn.Module):
    """One frame of one row leaves rounding alone."""

    def __init__(self) -> None:
        super().__init__()
        self.l, self.n = nn.Linear(6, 8), nn.BatchNorm1d(8, track_running_stats=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.n(self.l(x).transpose(1, 2))


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


PADDING = torch.tensor([[False] * 4 + [True] * 2, [False] * 6])
BATCH, BOTH = {0: "batch"}, {0: "batch", 1: "time"}
CASES: dict[str, tuple[nn.Module, tuple[torch.Tensor, ...], dict[str, Any]]] = {
    "padded": (Padded(False), (drawn(2, 6, 6), PADDING), {"x": BOTH, "src_key_padding_mask": BOTH}),
    "padded, fused": (Padded(True), (drawn(2, 6, 6), PADDING), {"x": BOTH, "src_key_padding_mask": BOTH}),
    "padded, fixed": (Padded(False), (drawn(2, 6, 6), PADDING), {}),
    "pooled": (Pooled(), (drawn(2, 6, 6), ~PADDING), {"x": BOTH, "mask": BOTH}),
    "pooled, nothing hidden": (Pooled(), (drawn(2, 6, 6), PADDING == PADDING), {"x": BOTH, "mask": BOTH}),
    "deviation": (Deviation(), (drawn(2, 9, 6),), {"x": BOTH}),
    "neighbours": (
        Neighbours(),
        (drawn(7, 6), torch.randint(0, 7, (2, 12), generator=torch.Generator().manual_seed(0))),
        {"x": {0: "nodes"}, "edges": {1: "edges"}},
    ),
    "logarithm": (Logarithm(), (drawn(3, 5, 6).abs() + 0.1,), {"x": BOTH}),
    "logarithm of ones": (Logarithm(), (torch.ones(3, 5, 6),), {"x": BOTH}),
    "root": (Root(), (drawn(3, 5, 6).sigmoid(),), {"x": BOTH}),
    "speech": (Speech(), (drawn(2, 1600),), {"x": BOTH}),
    "normed": (Normed(), (drawn(2, 5, 6),), {"x": BOTH}),
}


def made(name: str, **spec: Any) -> adaptc.Compiled:
    model, examples, dynamic = CASES[name]
    compiled = adaptc.compile(
        {"adapt": [LORA], **spec}, model=randomise(model).eval(), example_inputs=examples, dynamic=dynamic
    )
    perturb(compiled.module)
    return compiled


@pytest.mark.parametrize(
    "name",
    marked(
        CASES, ("padded, fixed", "pooled, nothing hidden", "deviation", "neighbours", "logarithm", "root")
    ),
)
def test_a_model_is_proved_on_what_it_takes(name: str, tmp_path: Path) -> None:
    compiled, examples = made(name), CASES[name][1]
    compiled.emit("onnx", tmp_path / "model.onnx")
    for proof in compiled.proofs:
        assert proof.shapes[0] == "the example"
        assert len(proof.shapes) > 1, "no random inputs are like the example"
        assert "alone, since" not in str(proof)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    names = [value.name for value in session.get_inputs()]
    (got,) = session.run(None, {k: v.numpy() for k, v in zip(names, examples, strict=True)})
    with torch.no_grad():
        want = compiled.fold()(*examples)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    assert "computes what its graph did: relative error" in verify(tmp_path / "model.onnx")[-1]["checked"]


def test_random_inputs_are_no_smaller_than_the_model_takes() -> None:
    shapes = made("speech").proofs[0].shapes
    assert shapes == ("the example", "batch=2 time=80", "batch=2 time=64", "batch=2 time=1600")
    assert "time=1," not in str(made("deviation").proofs[0])


class Cancels(Layers):
    """One token cancels itself, up to rounding; several do not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.l(x)
        return h - (3.1 * h[:, :1] - 2.1 * h[:, -1:])


def test_what_is_rounding_alone_is_told_and_not_judged(tmp_path: Path) -> None:
    compiled = adaptc.compile(
        {"adapt": [LORA]}, model=randomise(Cancels()), example_inputs=(drawn(3, 5, 6),), dynamic={"x": BOTH}
    )
    perturb(compiled.module)
    compiled.emit("onnx", tmp_path / "model.onnx")
    proofs = {proof.name: proof for proof in compiled.proofs}
    for proof in (proofs["fold"], proofs["onnx, folded"]):
        assert proof.notes == ("output is lost in rounding on batch=1 time=1, and not compared there",)
        assert proof.uncompared == (("batch=1 time=1", 0),)
        assert proof.relative <= proof.tolerance < 6.2e-5
    assert "computes what its graph did" in verify(tmp_path / "model.onnx")[-1]["checked"]


def test_a_model_that_is_rounding_alone_is_told_as_that() -> None:
    class Nothing(Layers):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.l(x)
            return h - (3.1 * h - 2.1 * h)

    compiled = adaptc.compile({"adapt": [LORA]}, model=randomise(Nothing()), example_inputs=(drawn(3, 6),))
    perturb(compiled.module)
    with pytest.raises(ProofError, match=r"fold: output is lost in the model's own rounding, .* on any of"):
        compiled.fold()


class Factorised(Layers):
    """Only a matrix of one kind has a factor, and no random one is of it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(self.l(torch.linalg.cholesky(x)))


def test_where_only_a_persons_own_inputs_run_the_proof_says_so(tmp_path: Path) -> None:
    matrix = drawn(6, 6) @ drawn(6, 6).T + torch.eye(6)
    compiled = adaptc.compile(
        {"adapt": [LORA]}, model=randomise(Factorised()).eval(), example_inputs=(matrix,)
    )
    compiled.emit("torch", tmp_path / "program")
    compiled.check_gradients()
    for proof in compiled.proofs:
        assert proof.shapes == ("the example",)
        assert (
            "on a person's own inputs alone, since the model does not take random ones (linalg.cholesky"
            in str(proof)
        )
        assert "cholesky" in proof.skipped["fixed sizes"]
    manifest = json.loads((tmp_path / "program" / "manifest.json").read_text())
    (product,) = manifest["products"].values()
    assert product["proof"]["shapes"] == ["the example"]
    assert product["proof"]["notes"]
    assert product["provenance"]["proved_on"]["own"] == ["the example"]
    rows = verify(tmp_path / "program")
    assert rows[-1]["checked"].endswith("allowed, on the example")


def test_a_persons_own_inputs_are_kept_in_a_manifest_only_where_nothing_else_is(tmp_path: Path) -> None:
    compiled = made("logarithm")
    compiled.emit("torch", tmp_path / "program")
    manifest = json.loads((tmp_path / "program" / "manifest.json").read_text())
    (product,) = manifest["products"].values()
    assert product["reference"]["own"] == {}
    assert "the example" not in product["reference"]["values"]
    assert product["proof"]["shapes"][0] == "the example"


def test_calibration_rows_are_proof_inputs(tmp_path: Path) -> None:
    rows = [{"x": drawn(1, 5, 6).abs() + 0.5 + number} for number in range(3)]
    spec: Mapping[str, Any] = {"inputs": {"x": "float32[batch, time, 6]"}, "adapt": [LORA]}
    compiled = adaptc.compile(spec, model=randomise(Logarithm()).eval(), calibration=rows)
    (proof,) = compiled.proofs
    assert proof.shapes[:2] == ("calibration row 1", "calibration row 2")
    assert len(proof.shapes) == 5, "random ones are drawn like them"


def test_a_model_without_a_finite_value_is_told_as_that() -> None:
    class Undefined(Layers):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.o(self.l(x.log()))

    with pytest.raises(
        ProofError, match=r"gives no finite value for output on any .*: the example, "
    ) as caught:
        adaptc.compile({"adapt": [LORA]}, model=Undefined().eval(), example_inputs=(-drawn(3, 6).abs(),))
    assert "proof: {inputs: rows.jsonl}" in str(caught.value)


COUNT = [0]


class Remembers(Layers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        COUNT[0] += 1
        return self.o(self.l(x)) * COUNT[0]


class Draws(Layers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(self.l(x) + torch.rand_like(x))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Remembers(), "drew the same random numbers\n  forward keeps something from call to call"),
        (Draws(), "since it draws random numbers\n  drawn by rand_like, from test_proof_inputs.py:"),
    ],
)
def test_only_what_draws_random_numbers_is_called_random(model: nn.Module, words: str) -> None:
    with pytest.raises(TraceError) as caught:
        adaptc.compile({"adapt": [LORA]}, model=model.eval(), example_inputs=(drawn(3, 6),))
    assert words in str(caught.value)
