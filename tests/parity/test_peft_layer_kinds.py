"""Every type of PEFT that adaptc has, on every kind of layer: PEFT's outputs, or a refusal in words."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import adaptc
from adaptc.errors import AdaptcError
from adaptc.ir.module import bind
from adaptc.methods.method import METHODS
from tests.families import close, randomise

peft = pytest.importorskip("peft")


class Net(nn.Module):
    """Layers in a row, each by its own name, with what turns the value of one into the input of the next."""

    def __init__(self, **layers: Any) -> None:
        super().__init__()
        self.steps = [*layers]
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in self.steps:
            x = getattr(self, name)(x)
        return x


class Pooled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x).flatten(2).mean(-1)


class Attended(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(12, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mha(x, x, x, need_weights=False)[0]


class Times(nn.Module):
    """A matrix that is a parameter and no layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(8, 12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight)


def conv1d(out: int, inner: int) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(out, inner)


def noise(*shape: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.randn(*shape)


def mlp() -> nn.Module:
    return Net(lin0=nn.Linear(12, 20), act=nn.ReLU(), lin1=nn.Linear(20, 8))


def of_conv(layer: nn.Module) -> nn.Module:
    return Net(conv=layer, pool=Pooled(), lin=nn.Linear(8, 4))


BASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor], Sequence[Any]]] = {
    "linear": (mlp, noise(5, 12), [["lin0"], ["lin0", "lin1"], "lin1"]),
    "linear, one whole": (mlp, noise(5, 12), [{"target_modules": ["lin0"], "modules_to_save": ["lin1"]}]),
    "transposed": (
        lambda: Net(c0=conv1d(8, 12), act=nn.ReLU(), lin=nn.Linear(8, 4)), noise(5, 12), [["c0"], ["c0", "lin"]],
    ),
    "embedding": (
        lambda: Net(emb=nn.Embedding(20, 12), lin=nn.Linear(12, 4)),
        lambda: torch.randint(0, 20, (3, 5)),
        [["emb"], ["emb", "lin"], {"target_modules": ["lin"], "trainable_token_indices": {"emb": [0, 7]}}],
    ),
    "norm": (lambda: Net(norm=nn.LayerNorm(12), lin=nn.Linear(12, 4)), noise(5, 12), [["norm"], ["norm", "lin"]]),
    "conv1d": (lambda: of_conv(nn.Conv1d(4, 8, 3)), noise(3, 4, 9), [["conv"], ["conv", "lin"]]),
    "conv2d": (lambda: of_conv(nn.Conv2d(4, 8, 3)), noise(3, 4, 6, 6), [["conv"], ["conv", "lin"]]),
    "pointwise": (lambda: of_conv(nn.Conv2d(4, 8, 1)), noise(3, 4, 6, 6), [["conv"]]),
    "grouped": (lambda: of_conv(nn.Conv2d(4, 8, 3, groups=2)), noise(3, 4, 6, 6), [["conv"]]),
    "conv3d": (lambda: of_conv(nn.Conv3d(4, 8, 3)), noise(3, 4, 5, 5, 5), [["conv"]]),
    "attention": (
        lambda: Net(block=Attended(), lin=nn.Linear(12, 4)), noise(2, 5, 12), [["mha"], ["mha", "lin"]],
    ),
    "parameter": (
        lambda: Net(times=Times(), lin=nn.Linear(8, 4)),
        noise(5, 12),
        [
            {"target_parameters": ["times.weight"]},
            {"target_modules": ["lin"], "target_parameters": ["times.weight"]},
            {"target_parameters": ["times.weight", "lin.weight"]},
        ],
    ),
}  # fmt: skip
"""Name -> how the base is made, its input, and the targets: modules, or more keys of the configuration."""
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "LORA": [{"r": 2}, {"r": 2, "use_dora": True}],
    "ADALORA": [{"init_r": 3, "target_r": 2, "total_step": 9}],
    "IA3": [{"feedforward_modules": []}, {"feedforward_modules": "="}],
    "LOHA": [{"r": 2}, {"r": 2, "use_effective_conv2d": True}],
    "LOKR": [{"r": 2}, {"r": 2, "use_effective_conv2d": True, "decompose_both": True}],
    "OFT": [{"oft_block_size": 4}, {"r": 2, "oft_block_size": 0, "block_share": True}],
    "BOFT": [{"boft_block_size": 2}, {"boft_block_size": 2, "boft_n_butterfly_factor": 2}],
    "HRA": [{"r": 2}],
    "VERA": [{"r": 4}],
    "VBLORA": [{"r": 2, "num_vectors": 6, "vector_length": 4}],
    "RANDLORA": [{"r": 2}],
    "GRALORA": [{"r": 4, "gralora_k": 2}],
    "HIRA": [{"r": 2}],
    "C3A": [{"block_size": 4}],
    "MISS": [{"r": 2}],
    "FOURIERFT": [{"n_frequency": 5}],
    "SHIRA": [{"r": 1}],
    "DELORA": [{"r": 2}],
    "ROAD": [{"group_size": 4}],
    "TRAINABLE_TOKENS": [{"token_indices": [0, 4]}],
}
"""Type -> the options that it is tried with, small enough for these layers; "=" is the target."""
TYPES = sorted({str(cls.peft.type) for cls in METHODS.values() if cls.peft is not None and cls.peft.type})
MERGED = {("OFT", "conv2d")}
"""(type, base) where PEFT's layer computes something else than the weight it merges: what overlaps is averaged."""
LAYERED = [name for name in TYPES if "TUNING" not in name or name == "LN_TUNING"]
ACROSS = "reaches across groups"
REFUSED: dict[tuple[str, str], str] = {
    # PEFT leaves its adapter's name in these keys
    ("LN_TUNING", "attention"): "ln_tuning_layers.weight' is missing",
    ("LORA", "grouped"): ACROSS,
    ("OFT", "grouped"): ACROSS,
    ("TRAINABLE_TOKENS", "linear"): "the target matches no embedding layer",
}
"""(type, base) -> the words of the refusal, where PEFT computes what adaptc does not."""


def configured(name: str, options: dict[str, Any], target: Any) -> Any:
    more = target if isinstance(target, dict) else {"target_modules": target}
    stated = {
        key: more.get("target_modules", []) if value == "=" else value for key, value in options.items()
    }
    return peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType[name]](**stated, **more)


def trained(configure: Callable[[], Any], model: nn.Module, directory: Path) -> nn.Module | None:
    """PEFT's model with random weights, saved; None where PEFT has no such adapter."""
    try:
        adapted: Any = peft.get_peft_model(model, configure()).eval()
    except (ValueError, TypeError, RuntimeError, NotImplementedError, KeyError, AttributeError, IndexError):
        return None
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(directory)
    return adapted


def outcome(name: str, base: str, options: dict[str, Any], target: Any, directory: Path) -> str:
    """`right`, the words of a refusal, or "" where PEFT has no such adapter; a wrong result fails."""
    build, example, _ = BASES[base]
    torch.manual_seed(0)
    model, x = randomise(build()).eval(), example()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = trained(lambda: configured(name, options, target), copy.deepcopy(model), directory)
    if theirs is None:
        return ""
    with torch.no_grad():
        try:
            want = theirs(x)
        except (RuntimeError, ValueError, TypeError, AttributeError):
            return ""  # PEFT takes it and cannot run it
    try:
        ours = adaptc.compile({"adapt": [{"adapter": str(directory)}]}, model=model, example_inputs=(x,))
    except AdaptcError as error:
        return str(error)
    if (name, base) in MERGED:
        live, want = want, theirs.merge_and_unload()(x)
        assert (live - want).abs().max() > 1e-2, "PEFT agrees with itself now: take it out of MERGED"
    with torch.no_grad():
        close(bind(ours.live_graph()).eval()(x), want)
    return "right"


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", LAYERED)
def test_type_on_layer(name: str, base: str, tmp_path: Path) -> None:
    cases = [(o, t) for o in OPTIONS.get(name, [{}]) for t in BASES[base][2]]
    outcomes = [outcome(name, base, o, t, tmp_path / str(n)) for n, (o, t) in enumerate(cases)]
    words = [text for text in outcomes if text not in ("", "right")]
    expected = REFUSED.get((name, base))
    assert all(expected is not None and expected in text for text in words), words
    assert not expected or words, "it is read now: take it out of REFUSED"
