"""Programs that take adapters as inputs: what they say of themselves, what fits them, and what does not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import nn

import adaptc
from adaptc.compiler.artifacts.deployed import make_adapter
from adaptc.compiler.compiled import Compiled
from adaptc.emit.onnx.adapter_check import base_number
from adaptc.emit.onnx.adapter_file import read_adapter
from adaptc.emit.onnx.runtime import open_session, session_call
from adaptc.errors import AdaptcError, SpecError, WeightError
from tests.families import Zoo, close, differs, entry, inputs, perturb, randomise

ADAPTERS: Mapping[str, Any] = {
    "alice": [{"method": "lora", "target": ["up", "down"], "r": 3, "alpha": 12}],
    "bob": [{"method": "ia3", "target": ["up"]}, {"method": "full", "target": "down"}],
}
X = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))


class Model(nn.Module):
    """Two layers, and one that no adapter of these tests sits on."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.mid, self.down = nn.Linear(16, 24), nn.Linear(24, 24), nn.Linear(24, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.mid(torch.tanh(self.up(x)))))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return randomise(Model()).eval()


def compiled(model: nn.Module, adapters: Mapping[str, Any] = ADAPTERS, **spec: Any) -> Compiled:
    """The model with alternatives, each trained as if it were."""
    made = adaptc.compile(
        {"adapters": adapters, **spec}, model=model, example_inputs=(X,), dynamic={"x": {0: "batch"}}
    )
    for seed, alternative in enumerate(made.alternatives.values()):
        perturb(alternative.module, seed)
    return made


@pytest.fixture(scope="module")
def built(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> tuple[Compiled, Path]:
    """A base program and its adapters."""
    made, folder = compiled(model), tmp_path_factory.mktemp("swap")
    made.emit("onnx", folder / "base.onnx", adapters="swap")
    for name in ADAPTERS:
        made.emit("onnx-adapter", folder / f"{name}.onnx_adapter", name=name)
    return made, folder


def test_a_session_runs_the_base_each_adapter_and_the_base_again(
    model: nn.Module, built: tuple[Compiled, Path]
) -> None:
    made, folder = built
    session = open_session(folder / "base.onnx")
    (base,) = session_call(session)({"x": X})
    close(base, model(X))
    for name, alternative in made.alternatives.items():
        (got,) = session_call(session, folder / f"{name}.onnx_adapter")({"x": X})
        close(got, alternative.module.eval()(X))
        differs(got, base)
    assert torch.equal(session_call(session)({"x": X})[0], base)


def test_a_program_has_places_for_what_the_alternatives_change_alone(built: tuple[Compiled, Path]) -> None:
    _, folder = built
    session = open_session(folder / "base.onnx")
    assert [value.name for value in session.get_inputs()] == ["x"]
    shapes = {value.name: value.shape for value in session.get_overridable_initializers()}
    assert shapes == {
        "up.adapter_rows": [24],
        "up.adapter_A": ["up.weight.rank", 16],
        "up.adapter_B": [24, "up.weight.rank"],
        "down.adapter_A": ["down.weight.rank", 24],
        "down.adapter_B": [6, "down.weight.rank"],
        "up.bias": [24],
        "down.weight": [6, 24],
        "down.bias": [6],
    }
    assert sorted(read_adapter(folder / "bob.onnx_adapter")) == [
        "down.bias",
        "down.weight",
        "up.adapter_rows",
        "up.bias",
    ]


def test_alpha_is_in_the_tensors(built: tuple[Compiled, Path]) -> None:
    made, folder = built
    trained = made.alternatives["alice"].graph.weights
    tensors = read_adapter(folder / "alice.onnx_adapter")
    torch.testing.assert_close(tensors["up.adapter_B"], 4 * trained["up.lora_B.alice.weight"].load())
    assert torch.equal(tensors["up.adapter_A"], trained["up.lora_A.alice.weight"].load())


def test_the_manifest_and_the_file_say_which_base_they_fit(built: tuple[Compiled, Path]) -> None:
    made, folder = built
    products = json.loads((folder / "manifest.json").read_text())["products"]
    assert list(products["base.onnx"]["alternatives"]) == ["alice", "bob"]
    assert products["bob.onnx_adapter"]["adapter"] == "bob"
    assert products["bob.onnx_adapter"]["tensors"]["down.weight"] == [6, 24]
    file = onnxruntime.AdapterFormat.read_adapter(str(folder / "alice.onnx_adapter"))
    assert file.get_model_version() == base_number(made.base_sha256)


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_is_made_for_a_deployed_program(
    built: tuple[Compiled, Path], tmp_path: Path, name: str
) -> None:
    made, folder = built
    alternative = made.alternatives[name]
    alternative.save_adapter(tmp_path / "saved")
    shapes = make_adapter(folder / "base.onnx", tmp_path / "saved", tmp_path / "more.onnx_adapter")
    before = read_adapter(folder / f"{name}.onnx_adapter")
    after = read_adapter(tmp_path / "more.onnx_adapter")
    assert shapes == {key: list(value.shape) for key, value in before.items()}
    assert all(torch.equal(after[key], before[key]) for key in before)


def saved(model: nn.Module, entry: Mapping[str, Any], folder: Path) -> Path:
    """The checkpoint of an adapter trained on a model."""
    made = adaptc.compile({"adapt": [entry]}, model=model, example_inputs=(X,))
    perturb(made.module)
    made.save_adapter(folder)
    return folder


@pytest.mark.parametrize(
    "entry",
    [
        {"method": "lora", "target": ["up"], "r": 11, "rslora": True},
        {"method": "lora", "target": ["up"], "r": 2, "init_weights": "pissa"},  # of the weight in the program
        {"method": "vera", "target": ["up", "down"], "r": 5, "save_projection": False},
        {"method": "dora", "target": ["up"], "r": 1},
    ],
)
def test_other_methods_and_ranks_fit(
    model: nn.Module, built: tuple[Compiled, Path], tmp_path: Path, entry: Mapping[str, Any]
) -> None:
    _, folder = built
    made = adaptc.compile({"adapt": [entry]}, model=model, example_inputs=(X,))
    perturb(made.module)
    made.save_adapter(tmp_path / "wide")
    make_adapter(folder / "base.onnx", tmp_path / "wide", tmp_path / "wide.onnx_adapter")
    (got,) = session_call(open_session(folder / "base.onnx"), tmp_path / "wide.onnx_adapter")({"x": X})
    close(got, made.module.eval()(X))
    differs(got, model(X))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"method": "lora", "target": ["mid"]},
            "the program has no place for mid, which it adapts (and 1 tensors more)\n  it has places on up, down",
        ),
        (
            {"method": "ia3", "target": ["down"]},
            "the program has no place for what scales its outputs on down",
        ),
        (
            {"method": "oft", "target": ["up"], "block_size": 4},
            "oft on up: it computes new weights from the base's",
        ),
        (
            {"method": "loha", "target": ["up"]},
            "loha on up: what it adds to a weight is no product of thin matrices",
        ),
    ],
)
def test_what_does_not_fit_a_program_is_refused(
    model: nn.Module, built: tuple[Compiled, Path], tmp_path: Path, entry: Mapping[str, Any], message: str
) -> None:
    _, folder = built
    checkpoint = saved(model, entry, tmp_path / "saved")
    with pytest.raises(WeightError) as error:
        make_adapter(folder / "base.onnx", checkpoint, tmp_path / "more.onnx_adapter")
    assert message in str(error.value)
    assert "fold it into a program of its own" in str(error.value)
    assert not (tmp_path / "more.onnx_adapter").exists()


def test_an_adapter_of_another_base_is_refused(built: tuple[Compiled, Path], tmp_path: Path) -> None:
    _, folder = built
    checkpoint = saved(
        randomise(Model(), seed=9).eval(), {"method": "lora", "target": ["up"]}, tmp_path / "saved"
    )
    with pytest.raises(WeightError, match="this adapter was trained on another base: its own has SHA-256"):
        make_adapter(folder / "base.onnx", checkpoint, tmp_path / "more.onnx_adapter")


def test_a_program_without_places_is_refused(model: nn.Module, tmp_path: Path) -> None:
    made = adaptc.compile({}, model=model, example_inputs=(X,))
    made.emit("onnx", tmp_path / "plain.onnx")
    with pytest.raises(SpecError, match=r"plain\.onnx takes no adapters"):
        make_adapter(tmp_path / "plain.onnx", tmp_path, tmp_path / "x.onnx_adapter")
    with pytest.raises(SpecError, match=r"none\.onnx: no such file"):
        make_adapter(tmp_path / "none.onnx", tmp_path, tmp_path / "x.onnx_adapter")


def test_what_is_always_on_is_in_the_base(model: nn.Module, tmp_path: Path) -> None:
    made = compiled(
        model, {"alice": ADAPTERS["alice"]}, adapt=[{"method": "lora", "target": ["up", "mid"], "r": 2}]
    )
    always = made.module
    perturb(always, 7)
    made.emit("onnx", tmp_path / "base.onnx", adapters="swap")
    made.emit("onnx-adapter", tmp_path / "alice.onnx_adapter", name="alice")
    session = open_session(tmp_path / "base.onnx")
    close(session_call(session)({"x": X})[0], always.eval()(X))
    (got,) = session_call(session, tmp_path / "alice.onnx_adapter")({"x": X})
    proved = {proof.name: proof for proof in made.proofs}
    assert proved["onnx, swap, alice"].relative < 1e-5
    differs(got, always(X))


def test_a_tensor_that_is_used_elsewhere_is_not_replaced(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
            self.head.weight = self.words.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(torch.tanh(self.words(ids)))

    adapters = {"a": [{"method": "full", "target": "head"}]}
    made = adaptc.compile(
        {"adapters": adapters}, model=randomise(Tied()).eval(), example_inputs=(torch.arange(6)[None],)
    )
    with pytest.raises(
        SpecError, match=r"adapters\.a\.0: 'a' cannot be swapped: full on head: .* which would change"
    ):
        made.emit("onnx", tmp_path / "base.onnx", adapters="swap")


def test_the_plan_shows_each_alternative(model: nn.Module) -> None:
    plan = compiled(model).plan
    told = plan.to_json()["adapters"]
    assert [entry["place"] for entry in told["bob"]["entries"]] == ["adapters.bob.0", "adapters.bob.1"]
    assert told["alice"]["trainable"] == 3 * (16 + 24 + 24 + 6)
    assert [entry["adapter"] for entry in told["alice"]["entries"]] == ["alice"]


def test_problems_of_every_alternative_are_told(model: nn.Module) -> None:
    adapters = {
        "a": [{"method": "lora", "target": "upp"}],
        "b": [{"method": "lora", "target": "up", "r": 90}],
    }
    with pytest.raises(SpecError) as error:
        compiled(model, adapters)
    assert "adapters.a.0.target" in str(error.value)
    assert "adapters.b.0.r: lora: rank r must be at most 16 here, got 90" in str(error.value)


def test_an_adapter_that_is_not_finite_is_not_written(
    built: tuple[Compiled, Path], model: nn.Module, tmp_path: Path
) -> None:
    made = compiled(model, {"alice": ADAPTERS["alice"]})
    with torch.no_grad():
        next(p for p in made.alternatives["alice"].module.parameters() if p.requires_grad)[0] = float("nan")
    with pytest.raises(AdaptcError, match="contains NaN or infinity"):
        made.emit("onnx-adapter", tmp_path / "alice.onnx_adapter", name="alice")
    assert not (tmp_path / "alice.onnx_adapter").exists()


def test_checkpoints_of_every_alternative_are_saved_by_name(model: nn.Module, tmp_path: Path) -> None:
    made = compiled(model, adapt=[{"method": "lora", "target": ["mid"], "r": 2}])
    made.emit("peft", tmp_path / "saved")
    again = adaptc.compile(
        {
            "adapt": [{"adapter": str(tmp_path / "saved")}],
            "adapters": {name: [{"adapter": str(tmp_path / "saved" / name)}] for name in ADAPTERS},
        },
        model=model,
        example_inputs=(X,),
    )
    for name, alternative in made.alternatives.items():
        close(again.alternatives[name].module.eval()(X), alternative.module.eval()(X))


def test_a_plan_notes_what_no_artifact_holds(model: nn.Module) -> None:
    emit = [{"format": "onnx", "path": "base.onnx", "adapters": "swap"}]
    emit.append({"format": "onnx-adapter", "path": "bob.onnx_adapter", "name": "bob"})
    notes = compiled(model, emit=emit).plan.notes
    assert (
        "adapters.alice: no artifact holds it: emit {format: onnx-adapter, path: ..., name: alice}" in notes
    )
    assert not any("adapters.bob" in note for note in notes)


@pytest.mark.slow
def test_a_hundred_adapters_of_a_classifier_on_one_session(zoo: Zoo, tmp_path: Path) -> None:
    adapters = {
        "lora": [entry("lora", "bert", r=3, target=["*.query"]), {"method": "full", "target": "classifier"}],
        "ia3": [entry("ia3", "bert"), {"method": "full", "target": "classifier"}],
    }
    made = zoo.compiled("bert", [], adapters=adapters)
    module: Any = made.module.eval()
    made.emit("onnx", tmp_path / "base.onnx", adapters="swap")
    session, batch = open_session(tmp_path / "base.onnx"), inputs("bert", 3, pad=True)
    with torch.no_grad():
        base = session_call(session)(batch)[0]
        calls: list[Any] = []
        wanted: list[torch.Tensor] = []
        for number in range(100):
            module.set_adapter(list(adapters)[number % 2])
            perturb(module, seed=number)
            wanted.append(module(**batch).logits)
            module.save_adapter(module.active, tmp_path / f"{number}")
            file = tmp_path / f"{number}.onnx_adapter"
            make_adapter(tmp_path / "base.onnx", tmp_path / f"{number}", file)
            calls.append(session_call(session, file))
    for number in torch.randperm(100, generator=torch.Generator().manual_seed(0)).tolist():
        close(calls[number](batch)[0], wanted[number])
    differs(wanted[0], wanted[2])
    assert torch.equal(session_call(session)(batch)[0], base)
