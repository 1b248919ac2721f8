"""Alternatives in torch: one module, of whose adapters one at a time is active."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import adaptc
from adaptc.compiler.compiled import Compiled
from adaptc.errors import AdaptcError, SpecError
from adaptc.ir.switched import SwitchedModule
from tests.families import close, differs, perturb, randomise
from tests.small_models import outputs_by_adapter

ADAPTERS: Mapping[str, Any] = {
    "alice": [{"method": "lora", "target": ["up", "down"], "r": 3}],
    "bob": [{"method": "oft", "target": ["up"], "block_size": 4}, {"method": "full", "target": "down"}],
    "carol": [{"method": "lora", "target": ["up"], "r": 2}],
}
X = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))


class Model(nn.Module):
    """Two layers with batch norm and dropout between them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.drop, self.down = (
            nn.Linear(16, 24),
            nn.BatchNorm1d(24),
            nn.Dropout(0.2),
            nn.Linear(24, 6),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.drop(torch.relu(self.norm(self.up(x)))))


def compiled(**spec: Any) -> Compiled:
    made = adaptc.compile(
        {"adapters": ADAPTERS, **spec},
        model=randomise(Model()).eval(),
        example_inputs=(X,),
        dynamic={"x": {0: "batch"}},
    )
    perturb(made.module)
    return made


@pytest.fixture(scope="module")
def made() -> Compiled:
    return compiled()


@pytest.fixture
def module(made: Compiled) -> SwitchedModule:
    assert isinstance(made.module, SwitchedModule)
    made.module.set_adapter(None)
    return made.module.eval()


def test_each_adapter_is_the_model_compiled_with_it_alone(made: Compiled, module: SwitchedModule) -> None:
    assert module.active is None
    assert module.adapters == tuple(ADAPTERS)
    model = randomise(Model()).eval()
    values = outputs_by_adapter(module, X)
    close(values[None], model(X))
    for name, entries in ADAPTERS.items():
        alone = adaptc.compile(
            {"adapt": [e | {"name": name} for e in entries]}, model=model, example_inputs=(X,)
        )
        held = module.state_dict()
        alone.module.load_state_dict({key: held[key] for key in alone.module.state_dict()})
        close(values[name], alone.module.eval()(X))
        differs(values[name], values[None])
        close(values[name], made.alternatives[name].module.eval()(X))


def test_an_unknown_adapter_is_refused(module: SwitchedModule) -> None:
    with pytest.raises(AdaptcError, match="unknown adapter 'alise'; did you mean 'alice'"):
        module.set_adapter("alise")


def test_only_the_active_adapter_learns() -> None:
    module = compiled().module
    before = {name: value.clone() for name, value in module.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.1)
    module.set_adapter("carol")
    for _ in range(3):
        optimizer.zero_grad()
        module.train()(X).square().sum().backward()
        optimizer.step()
    changed = {n for n, value in module.state_dict().items() if not torch.equal(value, before[n])}
    learned = {name for name in changed if not name.startswith("norm.")}  # the statistics of batch norm
    assert learned == {"up.lora_A.carol.weight", "up.lora_B.carol.weight"}


def test_a_swap_leaves_every_other_adapter_as_it_was(module: SwitchedModule) -> None:
    first = outputs_by_adapter(module, X)
    for _ in range(5):
        again = outputs_by_adapter(module, X)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_copy_has_its_own_tensors_and_adapter(module: SwitchedModule) -> None:
    values = outputs_by_adapter(module, X)
    copied = copy.deepcopy(module)
    copied.set_adapter("bob")
    assert (module.active, copied.active) == (None, "bob")
    close(copied(X), values["bob"])
    perturb(copied, seed=3)
    close(outputs_by_adapter(module, X)["bob"], values["bob"])


@pytest.mark.slow
def test_a_torch_artifact_has_every_adapter(made: Compiled, module: SwitchedModule, tmp_path: Path) -> None:
    values = outputs_by_adapter(module, X)
    module.set_adapter("alice")
    made.emit("torch", tmp_path / "module")
    assert module.active == "alice"
    loaded = adaptc.load(tmp_path / "module").eval()
    assert isinstance(loaded, SwitchedModule)
    assert loaded.active is None
    again = outputs_by_adapter(loaded, X)
    assert all(torch.equal(again[name], values[name]) for name in values)
    assert loaded.state_dict().keys() == module.state_dict().keys()
    files = json.loads((tmp_path / "module" / "manifest.json").read_text())["products"]["program.pt2"][
        "files"
    ]
    programs = {"adapters/alice.pt2", "adapters/bob.pt2", "adapters/carol.pt2", "program.pt2"}
    assert programs | {"rows.pt2"} == set(files)
    proved = {proof.name for proof in made.proofs}
    assert {"torch artifact", "torch artifact, alice", "trainable module, bob"} <= proved


def test_the_adapter_that_is_saved_is_the_active_one(module: SwitchedModule, tmp_path: Path) -> None:
    module.set_adapter("carol")
    adaptc.save_adapter(module, tmp_path / "carol")
    config = json.loads((tmp_path / "carol" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("LORA", 2)
    before = module.state_dict()["up.lora_B.carol.weight"].clone()
    with torch.no_grad():
        module.get_parameter("up.lora_B.carol.weight").zero_()
    adaptc.load_adapter(module, tmp_path / "carol")
    assert torch.equal(module.state_dict()["up.lora_B.carol.weight"], before)


def test_what_is_always_on_stays_on() -> None:
    made = compiled(adapt=[{"method": "lora", "target": ["up"], "r": 2}])
    module = made.module.eval()
    assert isinstance(module, SwitchedModule)
    values = outputs_by_adapter(module, X)
    differs(values[None], randomise(Model()).eval()(X))
    with torch.no_grad():
        module.get_parameter("up.lora_B.default.weight").mul_(2)
    for name, value in outputs_by_adapter(module, X).items():
        differs(value, values[name])


def test_torch_compile_follows_a_swap(module: SwitchedModule) -> None:
    values = outputs_by_adapter(module, X)
    fast: Any = torch.compile(module, fullgraph=True, backend="eager")
    for name in ("alice", None, "bob", "alice"):
        module.set_adapter(name)
        close(fast(X), values[name])


def test_two_alternatives_do_not_share_tensors() -> None:
    entry = {"method": "lora", "target": "0", "r": 2, "name": "same"}
    model, x = nn.Sequential(nn.Linear(8, 4)).eval(), torch.randn(2, 8)
    with pytest.raises(
        SpecError, match=r"adapters\.bob\.0: 'alice' has an adapter named 'same' on 0"
    ) as error:
        adaptc.compile({"adapters": {"alice": [entry], "bob": [entry]}}, model=model, example_inputs=(x,))
    assert "give one of them another `name`" in str(error.value)


def test_alternatives_that_differ_in_tensors_alone_share_their_code() -> None:
    entry = {"method": "lora", "target": "0", "r": 2}
    model, x = nn.Sequential(nn.Linear(8, 4)).eval(), torch.randn(2, 8)
    adapters = {"alice": [entry], "bob": [entry], "carol": [{**entry, "alpha": 3}]}
    module: Any = adaptc.compile({"adapters": adapters}, model=model, example_inputs=(x,)).module
    perturb(module)
    outputs: dict[Any, torch.Tensor] = {}
    codes: dict[Any, Any] = {}
    for name in ("alice", "bob", "carol", None):
        module.set_adapter(name)
        outputs[name], codes[name] = module(x), module._run
    assert codes["alice"] is codes["bob"]
    assert len(set(codes.values())) == 3
    assert len({float(value.detach().sum()) for value in outputs.values()}) == 4
    for name in ("bob", None, "alice", "carol") * 25:
        module.set_adapter(name)
        assert module._run is codes[name]
        assert torch.equal(module(x), outputs[name])
        assert module.active == name
    copied = copy.deepcopy(module)
    for name in outputs:
        copied.set_adapter(name)
        assert torch.equal(copied(x), outputs[name])
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor):
        node.args = (node.args[0], 7.0)
    module.recompile()
    differs(module(x), outputs["carol"])
    module.set_adapter("alice")
    assert torch.equal(module(x), outputs["alice"])
