"""Damaged adapters beside PEFT: what is read gives PEFT's outputs, and what is not is refused in words."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import adaptc
from adaptc.errors import AdaptcError
from tests.adapter_mutations import CONFIG, TENSORS, mutate
from tests.families import randomise

peft = pytest.importorskip("peft")
WRAPPERS = r"\b(_orig_mod|module|default)\.|\.default$"
X = torch.randint(0, 20, (3, 5), generator=torch.Generator().manual_seed(1))


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.lin0, self.norm, self.lin1 = (
            *(nn.Embedding(20, 12), nn.Linear(12, 20)),
            *(nn.LayerNorm(20), nn.Linear(20, 8)),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin1(self.norm(torch.tanh(self.lin0(self.emb(x)))))


ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": (
        "LORA",
        {"r": 4, "lora_alpha": 6, "target_modules": ["lin0", "lin1"], "rank_pattern": {"lin1": 2}},
    ),
    "lora-beside": (
        "LORA",
        {"r": 2, "target_modules": ["lin0", "emb"], "modules_to_save": ["lin1"], "bias": "lora_only"},
    ),
    "dora": ("LORA", {"r": 2, "target_modules": "lin0|lin1", "use_dora": True, "use_rslora": True}),
    "tokens": ("LORA", {"r": 2, "target_modules": ["lin0"], "trainable_token_indices": {"emb": [1, 5]}}),
    "ia3": ("IA3", {"target_modules": ["lin0", "lin1"], "feedforward_modules": ["lin1"]}),
    "loha": ("LOHA", {"r": 3, "alpha": 5, "target_modules": ["lin0", "lin1"]}),
    "lokr": ("LOKR", {"r": 2, "target_modules": ["lin0"], "decompose_both": True}),
    "oft": ("OFT", {"oft_block_size": 4, "target_modules": ["lin0", "emb"]}),
    "boft": ("BOFT", {"boft_block_size": 4, "target_modules": ["lin0"]}),
    "vera": ("VERA", {"r": 4, "target_modules": ["lin0"]}),
    "adalora": ("ADALORA", {"init_r": 3, "target_r": 2, "total_step": 9, "target_modules": ["lin0"]}),
    "norms": ("LN_TUNING", {"target_modules": ["norm", "lin1"]}),
    "shira": ("SHIRA", {"r": 1, "target_modules": ["lin0"]}),
    "c3a": ("C3A", {"block_size": 4, "target_modules": ["lin0", "lin1"]}),
}


def base() -> nn.Module:
    return randomise(Base()).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("saved")

    @cache
    def make(name: str) -> Path:
        kind, options = ADAPTERS[name]
        torch.manual_seed(0)
        config = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType[kind]](**options)
        with warnings.catch_warnings():  # PEFT warns of norms, and of BOFT without CUDA
            warnings.simplefilter("ignore")
            model: Any = peft.get_peft_model(base(), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder / name)
        return folder / name

    return make


IDLE = (
    *("task_type", "peft_version", "revision", "base_model_name_or_path", "module_dropout", "rank_dropout"),
    *("lora_ga_config", "eva_config", "corda_config", "loftq_config"),
)
"""Options that no output depends on; PEFT refuses some values of them that are read here."""


def plain(directory: Path) -> Path:
    """A copy that PEFT reads as adaptc does the damaged one.

    Its keys have no parts that a wrapper or the adapter's name put there, which PEFT passes over, and its configuration
    no `IDLE` options.
    """
    copied = directory.parent / "plain"
    shutil.rmtree(copied, ignore_errors=True)
    shutil.copytree(directory, copied)
    config = json.loads((copied / CONFIG).read_text())
    (copied / CONFIG).write_text(json.dumps({key: v for key, v in config.items() if key not in IDLE}))
    tensors = load_file(copied / TENSORS)
    save_file({re.sub(WRAPPERS, "", key): tensor for key, tensor in tensors.items()}, copied / TENSORS)
    return copied


def theirs(directory: Path) -> torch.Tensor | str:
    """PEFT's outputs, or why it gives none: it refuses, or draws tensors that the file lacks at random."""
    try:
        directory = plain(directory)
        model = peft.PeftModel.from_pretrained(base(), directory).eval()
        with torch.no_grad():
            first = model(X)
            torch.manual_seed(5)
            again = peft.PeftModel.from_pretrained(base(), directory).eval()(X)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return first if torch.equal(first, again) or not torch.isfinite(first).all() else "random"


def ours(directory: Path) -> torch.Tensor | str:
    try:
        compiled = adaptc.compile({"adapt": [{"adapter": str(directory)}]}, model=base(), example_inputs=(X,))
        with torch.no_grad():
            return compiled.module.eval()(X)
    except AdaptcError as error:
        return str(error) or "no words"


def difference(directory: Path) -> str:
    """What is wrong with how a damaged adapter is read; "" if nothing is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            got = ours(directory)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        if isinstance(got, str):
            return "refused without a word" if got == "no words" else ""
        want = theirs(directory)
    if isinstance(want, str):
        return f"read, where PEFT says {want[:200]}"
    error = (got - want).abs().max() / want.abs().max().clamp_min(1e-30)
    return "" if error < 1e-4 else f"off by {float(error):.2g}"


def wrong(name: str, source: Path, seeds: range, scratch: Path) -> list[str]:
    faults: list[str] = []
    for seed in seeds:
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.copytree(source, scratch)
        done = mutate(scratch, seed)
        fault = difference(scratch)
        if fault:
            faults.append(f"{name} {seed}: {done}: {fault}")
    return faults


@pytest.mark.parametrize("name", ["lora-beside", "ia3"])
def test_damaged_adapters(saved: Any, name: str, tmp_path: Path) -> None:
    assert not wrong(name, saved(name), range(6), tmp_path / "damaged")


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTERS)
def test_many_damaged_adapters(saved: Any, name: str, tmp_path: Path) -> None:
    assert not wrong(name, saved(name), range(100, 140), tmp_path / "damaged")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "lora")) for n in ADAPTERS]
)
def test_whole_adapters(saved: Any, name: str) -> None:
    """What is compared is an adapter that has an effect."""
    got = ours(saved(name))
    assert isinstance(got, torch.Tensor), got
    assert (got - base()(X)).abs().max() > 1e-3
    assert difference(saved(name)) == ""
