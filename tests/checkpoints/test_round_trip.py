"""What adaptc saves it reads back: every mixture of methods, slices, single parameters and heads."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import adaptc
from adaptc.errors import AdaptcError
from adaptc.methods.method import METHODS
from tests.families import close, differs, perturb

IDS = torch.arange(3, 18).reshape(3, 5)


class Attention(nn.Module):
    """One head, with parameters of its own beside its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8, bias=False)
        self.gamma, self.bias = nn.Parameter(torch.empty(8)), nn.Parameter(torch.empty(5, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).split([8, 8, 8], -1)
        return self.gamma * self.out((q @ k.mT / 8**0.5 + self.bias).softmax(-1) @ v)


class Written(nn.Module):
    """A model as a person writes one: parameters at the root, names that end alike, names that are patterns."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.pos = nn.Embedding(30, 8), nn.Parameter(torch.empty(5, 8))
        self.scale, self.W = nn.Parameter(torch.empty(8)), nn.Parameter(torch.empty(8, 8))
        self.experts = nn.Parameter(torch.empty(2, 8, 8))
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(8), "attn": Attention(), "head": nn.Linear(8, 8)})
            for _ in range(2)
        )
        self.odd = nn.ModuleDict({"a[0]": nn.Linear(8, 8), "b*": nn.Linear(8, 8)})
        self.conv, self.mha = nn.Conv1d(8, 8, 3, padding=1), nn.MultiheadAttention(8, 2, batch_first=True)
        self.pre_head, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = (self.embed(ids) * self.scale + self.pos) @ self.W
        for block in self.blocks:
            assert isinstance(block, nn.ModuleDict)
            x = x + block["attn"](block["norm"](x))
            x = x + block["head"](x)
        x = x + self.conv(x.mT).mT + torch.einsum("bsi,eio->bso", x, self.experts)
        x = x + self.mha(x, x, x, need_weights=False)[0]
        return self.head(torch.tanh(self.pre_head(self.odd["b*"](torch.tanh(self.odd["a[0]"](x))))))


def entry(method: str, *target: str, **more: Any) -> dict[str, Any]:
    fields = METHODS[method].__dataclass_fields__  # type: ignore[attr-defined]
    ranks = {key: 2 for key in ("r", "init_r") if key in fields}
    return {"method": method, "target": [*target], **ranks, **METHODS[method].small, **more}


WHOLE = (
    "*",
    "pos",
    "W",
    "blocks.*.attn",
    "blocks.0.attn.gamma",
    "blocks.*.head",
    "head",
    "head.bias",
    "odd.*",
)
MATRICES = ("*", "W", "embed", "experts", "conv", "head", "pre_head", "blocks.*.head", "odd.*", "mha")
SINGLE = {
    **{f"full-{target}": entry("full", target) for target in WHOLE},
    **{f"lora-{target}": entry("lora", target) for target in MATRICES},
    "lora-half-of-attention": entry("lora", "mha.out_proj"),
    "lora-slices": entry("lora", "blocks.*.attn.qkv[q,v]"),
    "loha-rows": entry("loha", "blocks.1.attn.qkv[0:5]"),
    "half-a-norm": entry("layernorm", "blocks.1.norm.weight"),
    "biases": entry("bitfit", "blocks.*"),
    "biases-beside": entry("lora", "odd.*", biases="lora_only"),
    "words": entry("trainable-tokens", "embed"),
}
MIXED = {
    "a-parameter-of-the-root": [entry("lora", "conv"), entry("full", "*", parameters=["pos"])],
    "parameters-of-attentions": [entry("lora", "conv"), entry("full", "blocks.*.attn", parameters=["gamma"])],
    "the-weight-of-the-head": [entry("lora", "conv"), entry("full", "head", parameters=["weight"])],
    "the-bias-of-the-head": [entry("lora", "conv"), entry("full", "head.bias")],
    "biases-and-whole-modules": [entry("full", "blocks.*.attn"), entry("lora", "odd.*", biases="lora_only")],
    "three-in-order": [
        entry("lora", "conv", biases="lora_only"),
        entry("full", "head", name="b"),
        entry("lora", "*", name="b"),
    ],
    "one-between-two": [
        entry("full", "head", name="b"),
        entry("lora", "head", name="c"),
        entry("lora", "blocks.0.attn.out", name="b"),
    ],
    "names-that-end-alike": [entry("lora", "pre_head", "blocks.0.head"), entry("full", "head")],
    "one-of-three-heads": [entry("full", "head"), entry("dora", "conv")],
    "slices-and-wholes": [
        entry("lora", "blocks.*.attn.qkv[v]"),
        entry("layernorm", "*"),
        entry("full", "odd.*"),
    ],
}
QUICK = (
    "lora-W",
    "half-a-norm",
    "parameters-of-attentions",
    "one-of-three-heads",
    "biases-and-whole-modules",
)


def names(cases: dict[str, Any]) -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in cases]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    written = Written()
    for parameter in written.parameters():
        parameter.data = torch.randn_like(parameter) * 0.4
    return written.eval()


def compiled(model: nn.Module, adapt: list[dict[str, Any]]) -> adaptc.Compiled:
    return adaptc.compile({"adapt": adapt}, model=model, example_inputs={"ids": IDS})


def check(model: nn.Module, adapt: list[dict[str, Any]], directory: Path) -> None:
    first = compiled(model, adapt)
    perturb(first.module)
    with torch.no_grad():
        want = first.module.eval()(IDS)
        differs(model(IDS), want)
    for number in range(2):  # what was read is saved once more
        first.save_adapter(directory / str(number))
        first = compiled(model, [{"adapter": str(directory / str(number))}])
        close(first.module.eval()(IDS), want)
    again = compiled(model, adapt)
    again.load_adapter(directory / "0")
    close(again.module.eval()(IDS), want)


@pytest.mark.parametrize("name", names(SINGLE))
def test_one_method_comes_back(model: nn.Module, name: str, tmp_path: Path) -> None:
    check(model, [SINGLE[name]], tmp_path)


@pytest.mark.parametrize("name", names(MIXED))
def test_a_mixture_comes_back(model: nn.Module, name: str, tmp_path: Path) -> None:
    check(model, MIXED[name], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_a_random_mixture_comes_back(model: nn.Module, seed: int, tmp_path: Path) -> None:
    generator = random.Random(seed)
    for _ in range(20):
        entries = generator.sample(list(SINGLE.values()), generator.choice((2, 3)))
        adapt = [item | {"name": generator.choice(("default", "a", "b"))} for item in entries]
        try:
            compiled(model, adapt)
        except AdaptcError:
            continue  # it cannot be inserted in this order, so there is nothing to save
        return check(model, adapt, tmp_path)
    pytest.fail("none of 20 mixtures can be inserted")


def test_a_parameter_is_named_as_it_is_in_the_model(model: nn.Module) -> None:
    sites = compiled(model, [entry("full", "pos", "head.weight")]).plan.sites
    assert [site.name for site in sites] == ["pos", "head.weight"]
