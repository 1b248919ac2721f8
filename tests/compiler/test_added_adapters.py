"""Adapters that are added to a module, and removed: after a compile, and after a load."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import adaptc
from adaptc.errors import AdaptcError, SpecError, WeightError
from adaptc.ir.switched import SwitchedModule
from tests.families import close, differs, perturb
from tests.small_models import outputs_by_adapter

LORA = {"method": "lora", "target": "*", "r": 2}
HEAD = [{"method": "ia3", "target": "up"}, {"method": "full", "target": "down"}]
X = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
IDS = torch.tensor([2, 0, -1, 1, 3, 0])


class Small(nn.Module):
    """Two layers; the second one is the head."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


def compiled(**spec: Any) -> adaptc.Compiled:
    torch.manual_seed(0)
    made = adaptc.compile(
        {"adapters": {"alice": [LORA], "bob": HEAD}, **spec},
        model=Small(),
        example_inputs=(X,),
        dynamic={"x": {0: "batch"}},
    )
    made.module.eval()
    perturb(made.module)
    return made


def add(module: Any) -> None:
    """Two more adapters: one like another, and one that only it is like."""
    module.add_adapter("carol", [LORA])
    module.add_adapter("dave", [{"method": "dora", "target": "up", "r": 3}])
    module.set_adapter(None)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "carol" in name or "dave" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape))


def alone(module: Any) -> torch.Tensor:
    """What each row gets where its adapter is the active one."""
    values = outputs_by_adapter(module, X)
    names = [*module.adapters, None]
    return torch.stack([values[names[int(number)]][row] for row, number in enumerate(IDS)])


@pytest.fixture(scope="module")
def made() -> adaptc.Compiled:
    made = compiled()
    add(made.module)
    return made


def test_an_added_adapter_leaves_the_others_bit_for_bit() -> None:
    module: Any = compiled().module
    before, state = outputs_by_adapter(module, X), module.state_dict()
    names = {name for name, _ in module.named_modules()}
    module.set_adapter("bob")
    add(module)
    after = outputs_by_adapter(module, X)
    assert module.adapters == ("alice", "bob", "carol", "dave")
    assert all(torch.equal(before[name], after[name]) for name in before)
    differs(after["dave"], after[None])
    close(module(X, adapter_ids=IDS), alone(module))
    module.set_adapter("carol")
    module.remove_adapter("carol")
    assert module.active is None
    module.remove_adapter("dave")
    assert module.state_dict().keys() == state.keys()
    assert {name for name, _ in module.named_modules()} == names
    assert not [name for name, _ in module.named_buffers()]  # no constant of the graph of rows is left
    assert all(torch.equal(value, before[name]) for name, value in outputs_by_adapter(module, X).items())


def test_the_compile_has_it_too(made: adaptc.Compiled) -> None:
    module: Any = made.module
    assert list(made.alternatives) == list(module.adapters)
    close(made.alternatives["dave"].fold()(X), outputs_by_adapter(module, X)["dave"])


@pytest.mark.slow
def test_what_is_emitted_next_has_it(made: adaptc.Compiled, tmp_path: Path) -> None:
    module: Any = made.module
    made.emit("torch", tmp_path / "trainable")
    loaded: Any = adaptc.load(tmp_path / "trainable").eval()
    values = outputs_by_adapter(module, X)
    assert all(torch.equal(value, values[name]) for name, value in outputs_by_adapter(loaded, X).items())


def test_training_trains_the_active_one_only(made: adaptc.Compiled) -> None:
    module: Any = copy.deepcopy(made.module)
    everything = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.1)
    for name in ("alice", "bob", "carol"):
        module.set_adapter(name)
        mine = {n for n, p in module.named_parameters() if p.requires_grad}
        assert mine == {n for n, _ in module.named_parameters() if name in n.split(".")}
        for optimizer in (everything, torch.optim.AdamW([p for p in module.parameters() if p.requires_grad])):
            before = {n: value.clone() for n, value in module.state_dict().items()}
            everything.zero_grad()
            module(X).square().sum().backward()
            optimizer.step()
            changed = {n for n, value in module.state_dict().items() if not torch.equal(value, before[n])}
            assert changed == mine
    module.set_adapter(None)
    everything.zero_grad()
    module(X, adapter_ids=IDS).sum().backward()
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)


def test_checkpoints_of_each(made: adaptc.Compiled, tmp_path: Path) -> None:
    module: Any = copy.deepcopy(made.module)
    module.set_adapter("alice")
    values = outputs_by_adapter(module, X)
    for name in module.adapters:
        module.save_adapter(name, tmp_path / name)
    perturb(module)
    assert not torch.equal(outputs_by_adapter(module, X)["bob"], values["bob"])
    for name in module.adapters:
        module.load_adapter(name, tmp_path / name if name != "carol" else tmp_path)
    assert all(torch.equal(value, values[name]) for name, value in outputs_by_adapter(module, X).items())
    with pytest.raises(WeightError):
        module.load_adapter("alice", tmp_path / "bob")
    assert torch.equal(outputs_by_adapter(module, X)["alice"], values["alice"])


def test_a_spec_may_start_without_any(tmp_path: Path) -> None:
    made = compiled(adapters={})
    module: Any = made.module
    assert isinstance(module, SwitchedModule)
    assert module.adapters == ()
    made.emit("torch", tmp_path / "base")
    loaded: Any = adaptc.load(tmp_path / "base").eval()
    add(module)
    module.save_adapter("dave", tmp_path / "dave")
    loaded.add_adapter("dave", tmp_path / "dave")
    close(outputs_by_adapter(loaded, X)["dave"], outputs_by_adapter(module, X)["dave"])


@pytest.mark.slow
def test_an_artifact_takes_more_adapters(made: adaptc.Compiled, tmp_path: Path) -> None:
    compiled().emit("torch", tmp_path / "trainable")
    loaded: Any = adaptc.load(tmp_path / "trainable").eval()
    before = outputs_by_adapter(loaded, X)
    add(loaded)
    assert all(
        torch.equal(value, before[name])
        for name, value in outputs_by_adapter(loaded, X).items()
        if name in before
    )
    close(loaded(X, adapter_ids=IDS), alone(loaded))
    loaded.remove_adapter("bob")
    loaded.add_adapter("bob", [LORA])
    close(loaded(X, adapter_ids=IDS), alone(loaded))
    on = compiled(adapt=[{"method": "bitfit", "target": "up"}])
    on.emit("torch", tmp_path / "on")
    with pytest.raises(AdaptcError, match="its graph has adapters that are always on") as error:
        adaptc.load(tmp_path / "on").add_adapter("carol", [LORA])
    assert "name the adapter under `adapters` in its spec" in str(error.value)


def test_what_cannot_be_changed_is_told(made: adaptc.Compiled, tmp_path: Path) -> None:
    module: Any = made.module
    count = len(list(module.parameters()))
    for call, message in (
        (lambda: module.add_adapter("alice", [LORA]), "there is an adapter 'alice' already; remove_adapter"),
        (lambda: module.remove_adapter("alise"), "unknown adapter 'alise'; did you mean 'alice'"),
        (lambda: module.save_adapter("alise", tmp_path), "unknown adapter 'alise'; did you mean 'alice'"),
        (lambda: copy.deepcopy(module).add_adapter("erin", [LORA]), "this module is a copy: no adapter can"),
    ):
        with pytest.raises(AdaptcError, match=message):
            call()
    for entries, message in (
        ([{**LORA, "name": "alice"}], "adapters.erin.0: 'alice' has an adapter named 'alice' on up too"),
        ([{**LORA, "rank": 3}], "add_adapter('erin'): adapters.erin.0.rank: unknown key 'rank'"),
        ("nowhere", f"adapters.erin.0.adapter: {Path.cwd() / 'nowhere'}: no such directory"),
    ):
        with pytest.raises(SpecError) as error:
            module.add_adapter("erin", entries)
        assert message in str(error.value)
    assert len(list(module.parameters())) == count
    assert "erin" not in made.alternatives


def test_what_is_always_on_trains_on(tmp_path: Path) -> None:
    made = compiled(adapt=[{"method": "lora", "target": "up", "r": 2}])
    module: Any = made.module
    perturb(module, seed=9)
    module.add_adapter("carol", [LORA])
    perturb(module, seed=10)
    module.set_adapter("carol")
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert {"up.lora_A.default.weight", "up.lora_A.carol.weight"} <= trained
    close(made.alternatives["carol"].fold()(X), module(X))
    module.save_adapter("carol", tmp_path / "carol")
    assert {file.name for file in (tmp_path / "carol").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


@pytest.mark.slow
def test_a_swap_compiles_nothing_again() -> None:
    from torch._dynamo.testing import CompileCounter

    counter, module = CompileCounter(), compiled(adapters={"alice": [LORA], "bob": HEAD}).module
    assert isinstance(module, SwitchedModule)
    fast: Any = torch.compile(module, backend=counter, fullgraph=True)

    def swap_through() -> None:
        for name in (*module.adapters, None):
            module.set_adapter(name)
            close(fast(X), module(X))

    swap_through()
    assert counter.frame_count == 3  # alice, bob, the base
    for number in range(12):
        module.add_adapter(f"user{number}", [LORA])
    perturb(module)
    swap_through()
    module.remove_adapter("alice")
    module.load_state_dict({name: 2 * value for name, value in module.state_dict().items()}, assign=True)
    swap_through()
    assert counter.frame_count == 3
    module.set_adapter("user7")
    before = module.get_parameter("up.lora_B.user7.weight").clone()
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
    fast(X).square().sum().backward()
    optimizer.step()
    differs(module.get_parameter("up.lora_B.user7.weight"), before)
    close(fast(X), module(X))
    assert counter.frame_count == 3


@pytest.mark.slow
def test_a_hundred_changes_leave_memory_flat() -> None:
    module: Any = compiled().module

    def change() -> None:
        module.add_adapter("carol", [LORA])
        module.set_adapter("carol")
        module(X, adapter_ids=IDS.clamp(max=1))
        module.set_adapter("alice")
        module.remove_adapter("carol")

    def held() -> tuple[int, int]:
        gc.collect()
        tensors = [value for value in gc.get_objects() if isinstance(value, torch.Tensor)]
        return len(tensors), sum(
            value.untyped_storage().nbytes() for value in tensors if value.device.type == "cpu"
        )

    def resident() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * 4096

    for _ in range(5):
        change()
    values, before, bytes_before = outputs_by_adapter(module, X), held(), resident()
    for _ in range(100):
        change()
    assert held() == before
    assert resident() - bytes_before < 32 * 2**20
    assert all(torch.equal(value, values[name]) for name, value in outputs_by_adapter(module, X).items())
