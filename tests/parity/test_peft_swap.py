"""Adapters that PEFT trained, each made for one deployed program by `adaptc adapter`, and swapped in ONNX Runtime."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import adaptc
from adaptc.cli.app import main
from adaptc.compiler.artifacts.deployed import make_adapter
from adaptc.emit.onnx.runtime import open_session, session_call
from adaptc.errors import WeightError
from tests.families import Zoo, close, differs, entry, inputs, perturb

peft = pytest.importorskip("peft")
CONFIGURATIONS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"]),
    "rslora": lambda: peft.LoraConfig(r=16, use_rslora=True, target_modules=["v_proj"]),
    "dora": lambda: peft.LoraConfig(r=2, use_dora=True, target_modules=["q_proj"]),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
}


@pytest.fixture(scope="module")
def program(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base, with places for adapters on all its layers."""
    path: Path = tmp_path_factory.mktemp("swap") / "base.onnx"
    adapters = {
        "any": [entry("lora", "llama")],
        "scales": [entry("ia3", "llama")],
        "p": [entry("prefix", "llama")],
    }
    adaptc.compile({"base": zoo.base_of("llama"), "adapters": adapters}).emit("onnx", path, adapters="swap")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_peft_adapter_on_a_deployed_program(
    zoo: Zoo, program: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(zoo.fresh("llama"), CONFIGURATIONS[name]())
    perturb(adapted)
    adapted.save_pretrained(tmp_path / "trained")
    file = tmp_path / "x.onnx_adapter"
    command = ["adaptc", "adapter", str(program), str(tmp_path / "trained"), "-o", str(file)]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    tensors = inputs("llama", 2, 9, pad=True)
    if name == "prefix":  # PEFT counts positions itself
        del tensors["position_ids"]
    with torch.no_grad():
        want = adapted.eval()(**tensors).logits
    tensors = inputs("llama", 2, 9, pad=True)
    session = open_session(program)
    base = session_call(session)(tensors)[0]
    close(session_call(session, file)(tensors)[0], want)
    differs(base, want)
    assert torch.equal(session_call(session)(tensors)[0], base)


@pytest.mark.slow
def test_a_program_without_a_place_for_virtual_tokens_says_so(zoo: Zoo, tmp_path: Path) -> None:
    made = adaptc.compile({"base": zoo.base_of("llama"), "adapters": {"any": [entry("lora", "llama")]}})
    made.emit("onnx", tmp_path / "base.onnx", adapters="swap")
    peft.get_peft_model(zoo.fresh("llama"), CONFIGURATIONS["prefix"]()).save_pretrained(tmp_path / "trained")
    with pytest.raises(WeightError, match="the program has no place for virtual tokens: it has places on"):
        make_adapter(tmp_path / "base.onnx", tmp_path / "trained", tmp_path / "x.onnx_adapter")
