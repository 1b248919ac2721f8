"""Modules that PEFT trains whole, and what a refusal says of an adapter beside the base."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import adaptc
from adaptc.errors import AdaptcError
from tests.families import close, differs, perturb, randomise

peft = pytest.importorskip("peft")
X = torch.randn(6, 12, generator=torch.Generator().manual_seed(0))


class Batched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.norm, self.lin1 = nn.Linear(12, 20), nn.BatchNorm1d(20), nn.Linear(20, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin1(torch.tanh(self.norm(self.lin0(x))))


def base() -> nn.Module:
    return randomise(Batched()).eval()


def saved(directory: Path, config: Any, batches: int = 0) -> torch.Tensor:
    """Save an adapter as if trained, its batch norms on so many batches; gives its outputs."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = peft.get_peft_model(base(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
        for _ in range(batches):
            model.train()(X)
        model.save_pretrained(directory)
        return model.eval()(X)


def compiled(directory: Path) -> adaptc.Compiled:
    return adaptc.compile({"adapt": [{"adapter": str(directory)}]}, model=base(), example_inputs=(X,))


def trained_on(directory: Path, *entries: dict[str, Any]) -> adaptc.Compiled:
    adapt = [{"adapter": str(directory), "name": "first"}, *entries]
    return adaptc.compile({"adapt": adapt}, model=base(), example_inputs=(X,))


def refused(directory: Path) -> str:
    with pytest.raises(AdaptcError) as caught:
        compiled(directory)
    return str(caught.value)


def change(directory: Path, drop: str = "", add: dict[str, torch.Tensor] | None = None) -> None:
    file = directory / "adapter_model.safetensors"
    tensors = {key: value for key, value in load_file(file).items() if not drop or drop not in key}
    save_file(tensors | (add or {}), file)


WHOLE = {
    "modules_to_save": lambda: peft.LoraConfig(r=2, target_modules=["lin1"], modules_to_save=["norm"]),
    "a norm": lambda: peft.LNTuningConfig(target_modules=["norm"]),
}


@pytest.mark.parametrize("name", WHOLE)
def test_batch_norm_whose_statistics_are_the_bases(name: str, tmp_path: Path) -> None:
    want = saved(tmp_path, WHOLE[name]())
    assert any("running_mean" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    differs(base()(X), want)
    ours = compiled(tmp_path)
    close(ours.module.eval()(X), want)
    ours.load_adapter(tmp_path)
    close(ours.module.eval()(X), want)


@pytest.mark.parametrize("name", WHOLE)
def test_batch_norm_whose_statistics_were_trained(name: str, tmp_path: Path) -> None:
    saved(tmp_path, WHOLE[name](), batches=3)
    message = refused(tmp_path)
    assert "it holds norm.running_" in message
    assert "a state of norm that training left, which is not the base's" in message
    assert "merge_and_unload, save_pretrained" in message


def test_a_module_that_is_not_in_the_file(tmp_path: Path) -> None:
    saved(tmp_path, peft.LoraConfig(r=2, target_modules=["lin0"], modules_to_save=["lin1"]))
    change(tmp_path, drop="lin1")
    message = refused(tmp_path)
    assert "adapter_config.json" in message
    assert (
        "modules_to_save: lin1 was trained whole, and the file holds no tensor of it; it is incomplete"
        in message
    )
    assert 'its target_modules: ["lin0"]' in message


def test_half_of_a_module_in_the_file(tmp_path: Path) -> None:
    saved(tmp_path, peft.LoraConfig(r=2, target_modules=["lin0"], modules_to_save=["lin1"]))
    change(tmp_path, drop="lin1.bias")
    assert "tensor 'base_model.model.lin1.bias' is missing" in refused(tmp_path)


def test_an_option_is_named_before_its_tensors(tmp_path: Path) -> None:
    config = peft.VBLoRAConfig(
        r=2, num_vectors=300, vector_length=4, target_modules=["lin1"], save_only_topk_weights=True
    )
    saved(tmp_path, config)
    message = refused(tmp_path)
    assert "save_only_topk_weights: true changes what vblora computes" in message


def test_a_layer_that_the_configuration_does_not_name(tmp_path: Path) -> None:
    saved(tmp_path, peft.LoraConfig(r=2, target_modules=["lin0", "lin1"]))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": ["lin1"]}))
    message = refused(tmp_path)
    assert "2 tensors fit no layer this adapter was given: 'base_model.model.lin0.lora_A.weight'" in message
    assert "this base has lin0, and the configuration does not give it such a tensor" in message
    assert 'its target_modules: ["lin1"]' in message
    assert "another base" not in message


def test_a_layer_that_the_base_does_not_have(tmp_path: Path) -> None:
    saved(tmp_path, peft.LoraConfig(r=2, target_modules=["lin0"]))
    change(tmp_path, add={"base_model.model.side.deep.lora_A.weight": torch.ones(2, 12)})
    message = refused(tmp_path)
    assert "this base has no side; it holds lin0, lin1, norm" in message
    assert "its tensors: base_model.model.lin0.lora_A.weight" in message


@pytest.mark.parametrize("kind", ["VeraConfig", "RandLoraConfig", "VBLoRAConfig", "OFTConfig"])
def test_a_target_that_names_nothing(kind: str, tmp_path: Path) -> None:
    """Where the layers of an adapter share tensors, there is none to share them."""
    options = {"OFTConfig": {"oft_block_size": 4}, "VBLoRAConfig": {"vector_length": 4}}.get(kind, {"r": 4})
    saved(tmp_path, getattr(peft, kind)(target_modules=["lin0"], **options))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": ["nowhere"]}))
    message = refused(tmp_path)
    assert "the target matches no" in message
    assert 'its target_modules: ["nowhere"]' in message


@pytest.mark.parametrize("target", ["lin1", "lin1.weight"])
def test_what_was_trained_whole_is_trained_on(target: str, tmp_path: Path) -> None:
    want = saved(tmp_path / "a", peft.LoraConfig(r=2, target_modules=["lin0"], modules_to_save=["lin1"]))
    ours = trained_on(tmp_path / "a", {"method": "full", "target": target, "name": "second"})
    close(ours.module.eval()(X), want)
    assert any("a later entry trains lin1 on, from what this one holds" in note for note in ours.plan.notes)
    perturb(ours.module)
    want = ours.module.eval()(X).detach()
    close(ours.fold()(X), want)
    ours.save_adapter(tmp_path / "b")
    close(compiled(tmp_path / "b").module.eval()(X), want)


def test_what_only_holds_a_head_is_trained_on(tmp_path: Path) -> None:
    first = adaptc.compile(
        {"adapt": [{"method": "full", "target": "lin1"}]}, model=base(), example_inputs=(X,)
    )
    perturb(first.module)
    first.save_adapter(tmp_path)
    ours = trained_on(tmp_path, {"method": "full", "target": "lin1", "name": "second"})
    close(ours.module.eval()(X), first.module.eval()(X))
    name = "base_model.model.lin1.weight"
    change(tmp_path, add={name: torch.full((8, 20), torch.nan)})
    with pytest.raises(AdaptcError, match="contains NaN"):
        trained_on(tmp_path, {"method": "full", "target": "lin1", "name": "second"}).fold()
    change(tmp_path, add={name: torch.ones(3)})
    with pytest.raises(AdaptcError, match=r"has shape \[3\]"):
        trained_on(tmp_path, {"method": "full", "target": "lin1", "name": "second"})


def test_a_method_between_the_two_is_not_passed_over(tmp_path: Path) -> None:
    saved(tmp_path, peft.LoraConfig(r=2, target_modules=["lin0"], modules_to_save=["lin1"]))
    between = {"method": "lora", "r": 2, "target": "lin1", "name": "second"}
    with pytest.raises(AdaptcError, match="full replaces what an earlier entry does to lin1; write it first"):
        trained_on(tmp_path, between, {"method": "full", "target": "lin1", "name": "third"})
