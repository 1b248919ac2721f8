"""The table of layers and methods: every kind of site, beside PEFT where it has it, beside the expression where not."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import adaptc
from adaptc.emit.onnx.runtime import onnx_runner

METHODS = ("lora", "dora", "ia3")


class Chain(nn.Module):
    """A layer, an activation and a head."""

    def __init__(
        self, layer: nn.Module, head: int, call: Callable[[nn.Module, torch.Tensor], torch.Tensor]
    ) -> None:
        super().__init__()
        self.layer, self.head, self.call = layer, nn.Linear(head, 5), call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (batch, 5)."""
        return self.head(torch.tanh(self.call(self.layer, x)))


class Weight(nn.Module):
    """A parameter, and how it is multiplied by."""

    def __init__(self, shape: tuple[int, ...], multiply: Callable[[torch.Tensor, Any], torch.Tensor]) -> None:
        super().__init__()
        self.W, self.multiply = nn.Parameter(torch.empty(shape)), multiply

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The product."""
        return self.multiply(x, self.W)


@dataclass(frozen=True)
class Kind:
    """A kind of layer: how it is built and fed, what is targeted, and PEFT's way to say so, where it has one."""

    build: Callable[[], nn.Module]
    head: int
    call: Callable[[Any, torch.Tensor], torch.Tensor]
    shape: tuple[int, ...]
    target: str = "layer"
    peft: Mapping[str, Any] | None = field(default_factory=lambda: {"target_modules": ["layer"]})
    peft_has: tuple[str, ...] = METHODS
    integers: int = 0

    def example(self, batch: int, seed: int) -> torch.Tensor:
        """A random input."""
        generator = torch.Generator().manual_seed(seed)
        if self.integers:
            return torch.randint(0, self.integers, (batch, *self.shape), generator=generator)
        return torch.randn(batch, *self.shape, generator=generator)


def _plain(layer: Any, x: torch.Tensor) -> torch.Tensor:
    return layer(x)


def _pooled(layer: Any, x: torch.Tensor) -> torch.Tensor:
    return layer(x).flatten(2).mean(-1)


def _attended(layer: Any, x: torch.Tensor) -> torch.Tensor:
    return layer(x, x, x, need_weights=False)[0].mean(1)


def _encoded(layer: Any, x: torch.Tensor) -> torch.Tensor:
    return layer(x).mean(1)


BY_NAME: Mapping[str, Any] = {"target_modules": ["head"], "target_parameters": ["layer.W"]}
NOT_IA3, ONLY_LORA = ("lora", "dora"), ("lora",)
KINDS = {
    "Linear": Kind(lambda: nn.Linear(16, 24), 24, _plain, (16,)),
    "Conv1d": Kind(lambda: nn.Conv1d(4, 6, 3, stride=2), 6, _pooled, (4, 11), peft_has=NOT_IA3),
    "Conv2d": Kind(lambda: nn.Conv2d(4, 6, 3, padding=1), 6, _pooled, (4, 9, 9)),
    "Conv3d": Kind(lambda: nn.Conv3d(4, 6, 3), 6, _pooled, (4, 5, 5, 5)),
    "Conv2d, grouped": Kind(lambda: nn.Conv2d(4, 6, 3, groups=2), 6, _pooled, (4, 9, 9), peft_has=("ia3",)),
    "ConvTranspose2d": Kind(lambda: nn.ConvTranspose2d(4, 6, 3), 6, _pooled, (4, 5, 5), peft=None),
    "Embedding": Kind(lambda: nn.Embedding(20, 16), 16, _encoded, (7,), peft_has=NOT_IA3, integers=20),
    "MultiheadAttention": Kind(
        lambda: nn.MultiheadAttention(16, 4, batch_first=True), 16, _attended, (5, 16), "layer*", peft_has=ONLY_LORA
    ),
    "TransformerEncoder": Kind(
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2), 16, _encoded,
        (5, 16), "layer.*.linear?", {"target_modules": ["linear1", "linear2"]}, (),
    ),
    "slice of a fused Linear": Kind(lambda: nn.Linear(16, 24), 24, _plain, (16,), "layer[0:8]", None),
    "x @ W": Kind(lambda: Weight((16, 24), lambda x, W: x @ W), 24, _plain, (16,), peft=None),
    "einsum, W (out, in)": Kind(
        lambda: Weight((24, 16), lambda x, W: torch.einsum("bi,oi->bo", x, W)), 24, _plain, (16,), "layer.W", BY_NAME,
        ONLY_LORA,
    ),
    "bmm, W expanded": Kind(
        lambda: Weight((16, 24), lambda x, W: torch.bmm(x, W.expand(x.shape[0], 16, 24)).mean(1)), 24, _plain, (5, 16),
        peft=None,
    ),
    "experts (experts, out, in)": Kind(
        lambda: Weight((3, 24, 16), lambda x, W: torch.bmm(x.transpose(0, 1), W.transpose(1, 2)).mean(0)), 24, _plain,
        (3, 16), "layer.W", BY_NAME, ONLY_LORA,
    ),
    "linear of a slice of W": Kind(
        lambda: Weight((24, 16), lambda x, W: F.linear(x, W[:8])), 8, _plain, (16,), peft=None
    ),
}  # fmt: skip


def _peft_model(model: nn.Module, kind: Kind, method: str) -> Any:
    from peft import IA3Config, LoraConfig, get_peft_model

    assert kind.peft is not None
    config: Any = (
        IA3Config(feedforward_modules=[], **kind.peft)
        if method == "ia3"
        else LoraConfig(r=2, lora_alpha=4, use_dora=method == "dora", **kind.peft)
    )
    adapted = get_peft_model(copy.deepcopy(model), config)
    _perturb(adapted, 1)
    return adapted.eval()


def _perturb(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def _compiled(model: nn.Module, kind: Kind, entry: Mapping[str, Any]) -> adaptc.Compiled:
    dynamic = {"x": {0: "batch"}}
    return adaptc.compile(
        {"adapt": [entry]}, model=model, example_inputs=(kind.example(3, 0),), dynamic=dynamic
    )


def row(kind: Kind, method: str) -> dict[str, str]:
    """Adapt one kind of layer, train it, fold it, export it, and carry the adapter out and back in."""
    torch.manual_seed(0)
    model = Chain(kind.build(), kind.head, kind.call).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    work = Path(tempfile.mkdtemp(prefix="adaptc-kinds-"))
    known = kind.peft is not None and method in kind.peft_has
    if known:
        theirs = _peft_model(model, kind, method)
        theirs.save_pretrained(work / "peft")
        compiled = _compiled(model, kind, {"adapter": str(work / "peft")})
        reference: Any = theirs
    else:
        rank = {} if method == "ia3" else {"r": 2}
        compiled = _compiled(model, kind, {"method": method, "target": kind.target, **rank})
        _perturb(compiled.module, 1)
        reference = adaptc.bind(compiled.graph).eval()
    module, folded = compiled.module.eval(), compiled.fold()
    compiled.emit("onnx", work / "folded.onnx")
    program = onnx_runner(work / "folded.onnx")
    compiled.save_adapter(work / "ours")
    again = _compiled(model, kind, {"adapter": str(work / "ours")}).module.eval()
    worst: dict[str, float] = dict.fromkeys(("live", "fold", "onnx", "again"), 0.0)
    with torch.no_grad():
        for batch in (1, 4):
            x = kind.example(batch, batch)
            expected = reference(x)
            given = {"live": module(x), "fold": folded(x), "onnx": program({"x": x})[0], "again": again(x)}
            for name, got in given.items():
                worst[name] = max(worst[name], float((expected - got).abs().max() / expected.abs().max()))
    compiled.check_gradients()
    nodes = len(compiled.folded_graph().operations), len(compiled.base.operations)
    return {
        "against": "PEFT" if known else "the expression",
        "live": f"{worst['live']:.0e}",
        "folded": f"{worst['fold']:.0e}",
        "nodes folded = base": f"{nodes[0]} {'=' if nodes[0] == nodes[1] else '≠'} {nodes[1]}",
        "ONNX": f"{worst['onnx']:.0e}",
        "saved, read again": f"{worst['again']:.0e}",
    }


def rows() -> Iterator[tuple[tuple[str, str], dict[str, str]]]:
    """Every kind with every method that can sit there."""
    for name, kind in KINDS.items():
        for method in METHODS:
            if (name, method) != ("Embedding", "ia3"):  # indices have nothing to scale
                yield (name, method), row(kind, method)
