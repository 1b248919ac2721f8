"""Combined adapters beside PEFT's `add_weighted_adapter`, and conversions beside its `convert_to_lora`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import adaptc
from adaptc.arithmetic.change import changes_of
from adaptc.arithmetic.merging import ON_FACTORS, Merge
from adaptc.compiler.compiled import Compiled
from adaptc.compiler.driver import program_of
from adaptc.ir.graph import Graph
from adaptc.spec.spec import load
from adaptc.tracing.module import from_examples
from adaptc.tracing.trace import trace_base as trace
from adaptc.weights import read_safetensors
from tests.families import close, differs, randomise

peft = pytest.importorskip("peft")
WEIGHTS = [0.7, -0.4, 1.3]
SVD = ("svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
TARGETS = (["up", "words"], ["up", "image"], ["up", "words", "image", "down"])
"""What each of three adapters is on: one layer has all of them, one has the last alone."""


class Mixed(nn.Module):
    """A linear layer, a convolution and an embedding, in the order in which PEFT meets them."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.up = nn.Embedding(13, 10), nn.Linear(10, 12)
        self.image, self.down = nn.Conv2d(1, 6, (3, 2)), nn.Linear(12, 7)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.up(self.words(ids)).tanh()
        seen = self.image(x[:, None]).mean((2, 3))
        return self.down(x).mean(1) + seen.sum(1, keepdim=True)


IDS = torch.randint(0, 13, (2, 5))


@pytest.fixture(scope="module")
def graph() -> Graph:
    return trace(from_examples(randomise(Mixed()).eval(), (IDS,), {"ids": {0: "batch"}}))


def trained(tmp_path: Path, ranks: tuple[int, ...], **options: Any) -> Any:
    """A model of PEFT's with random adapters, saved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = None
        for name, targets, r in zip("abc", TARGETS, ranks, strict=True):
            config = peft.LoraConfig(r=r, lora_alpha=3 * r - 1, target_modules=targets, **options)
            if model is None:
                model = peft.PeftModel(randomise(Mixed()).eval(), config, adapter_name=name)
            else:
                model.add_adapter(name, config)
        generator = torch.Generator().manual_seed(3)
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.data = torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(tmp_path)
    return model


def combined_by_peft(model: Any, how: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """PEFT's combination under the name `all`; its random numbers start from 0 behind those of the new layers."""
    module = peft.tuners.lora.model
    freeze = module._freeze_adapter
    monkeypatch.setattr(module, "_freeze_adapter", lambda *a: (freeze(*a), torch.manual_seed(0)))
    model.add_weighted_adapter(list("abc"), WEIGHTS, "all", combination_type=how, **options)


def ours(graph: Graph, tmp_path: Path, how: str, **options: Any) -> Compiled:
    members = [{"adapter": str(tmp_path / n), "weight": w} for n, w in zip("abc", WEIGHTS, strict=True)]
    return Compiled(program_of(load({"adapt": [{"combine": members, "how": how, **options}]}), graph))


def deltas(model: Any, name: str) -> dict[str, torch.Tensor]:
    """PEFT's change of each layer's weight."""
    layers = {n.rpartition(".")[2]: m for n, m in model.named_modules() if hasattr(m, "get_delta_weight")}
    held = {n: m for n, m in layers.items() if name in m.lora_A or name in m.lora_embedding_A}
    return {n: m.get_delta_weight(name).detach() for n, m in held.items()}


QUICK = ("linear", "dare_ties", "svd")
"""Ways that stand for the others: of factors, with random numbers, of changes."""


@pytest.mark.parametrize(
    "how",
    [pytest.param(how, marks=[pytest.mark.slow] * (how not in QUICK)) for how in (*ON_FACTORS, *SVD)],
)
def test_every_way_of_combining(
    graph: Graph, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained(tmp_path, (2, 4, 3) if how in ("cat", "svd") else (3, 3, 3))
    pruned = how not in ("linear", "cat", "svd")
    density: dict[str, Any] = {"density": 0.6} if pruned else {}
    signs = {"majority_sign_method": "frequency"} if how in ("ties", "dare_ties_svd") else {}
    rank = {"svd_rank": 5} if how == "ties_svd" else {}
    combined_by_peft(model, how, monkeypatch, **density, **signs, **rank)
    compiled = ours(graph, tmp_path, how, **density, **signs, **rank)
    changes = {c.site.module: c.delta().float() for c in changes_of(graph, compiled.graph).values()}
    want = deltas(model, "all")
    assert changes.keys() == want.keys()
    for name, delta in want.items():
        assert delta.abs().max() > 0
        close(changes[name], delta)
    if how in ON_FACTORS and how != "cat":  # where a layer lacks an adapter, PEFT fills `cat` with zeros
        compiled.save_adapter(tmp_path / "ours")
        saved = read_safetensors(tmp_path / "ours" / "adapter_model.safetensors")
        theirs = peft.get_peft_model_state_dict(model, adapter_name="all")
        assert {k for k in theirs if "lora_" in k} == saved.keys()
        for key, weight in saved.items():
            close(weight.load(), theirs[key])


def test_what_peft_scales_wrong_is_right_here(graph: Graph, tmp_path: Path) -> None:
    """PEFT keeps `use_rslora`, so that its combination has the scale sqrt(r) once more."""
    model = trained(tmp_path, (3, 3, 3), use_rslora=True)
    compiled = ours(graph, tmp_path, "cat")
    changes = {c.site.module: c.delta().float() for c in changes_of(graph, compiled.graph).values()}
    alone = [deltas(model, name) for name in "abc"]
    for name, delta in changes.items():
        close(delta, sum(w * each[name] for w, each in zip(WEIGHTS, alone, strict=True) if name in each))
    model.add_weighted_adapter(list("abc"), WEIGHTS, "all", combination_type="cat")
    differs(deltas(model, "all")["up"], changes["up"])


@pytest.mark.parametrize("how", ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_the_rules_are_those_of_peft(how: str) -> None:
    theirs = getattr(peft.utils.merge_utils, how if how != "linear" else "task_arithmetic")
    tensors = [torch.randn(7, 5) for _ in range(3)]
    for dtype in (torch.float32, torch.bfloat16):
        for method in ("total", "frequency") if "ties" in how else ("total",):
            given = [t.to(dtype) for t in tensors]
            options = [0.4, method] if "ties" in how else [0.4] if how != "linear" else []
            torch.manual_seed(5)
            want = theirs(given, torch.tensor(WEIGHTS), *options)
            rule = Merge(how, 0.4, method)
            close(rule(given, WEIGHTS, dtype, torch.Generator().manual_seed(5)), want)


@pytest.mark.slow
@pytest.mark.parametrize("made", [peft.LoHaConfig, peft.LoKrConfig, peft.MissConfig])
def test_conversions_are_those_of_peft(made: Any, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel(randomise(Mixed()).eval(), made(r=2, target_modules=["up", "down"]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape)
    model.save_pretrained(tmp_path / "a")
    _, theirs = peft.convert_to_lora(model, 3)
    entry = {"combine": [{"adapter": str(tmp_path / "a")}], "svd_rank": 3}
    compiled = adaptc.compile({"adapt": [entry]}, model=randomise(Mixed()).eval(), example_inputs=(IDS,))
    changes = {c.site.module: c.delta().float() for c in changes_of(compiled.base, compiled.graph).values()}
    for name, delta in changes.items():
        A, B = (theirs[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB")
        if made is not peft.MissConfig:  # PEFT takes its own factors of the whole rank there
            close(delta, B @ A)
        differs(delta, torch.zeros_like(delta))
