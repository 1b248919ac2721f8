"""Modules as people write them: each is right in ONNX Runtime at other sizes, or refused at the author's line."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch._higher_order_ops import scan, while_loop
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import adaptc
from adaptc.emit.onnx.runtime import onnx_runner
from adaptc.errors import AdaptcError, SpecError
from tests.small_models import LORA, Calls, near

TIME = {0: "batch", 1: "time"}
BATCH = {0: "batch"}
IMAGE = {0: "batch", 2: "height"}


@dataclass
class Out:
    logits: torch.Tensor
    hidden: tuple[torch.Tensor, ...]
    loss: torch.Tensor | None = None


class Pair(NamedTuple):
    first: torch.Tensor
    mean: torch.Tensor


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l, self.d = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(
        self, x: torch.Tensor, *, scale: float = 1.0, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        return x + self.d(F.gelu(self.l(x))) * scale * (1 if mask is None else mask)


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.groups = nn.ModuleList([nn.ModuleList([Block(), Block()]) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, group in enumerate(self.groups):
            for block in group:  # type: ignore[attr-defined]
                x = block(x, scale=0.5 * number + 1, mask=(x[..., :1] > 0).to(x.dtype))
        return x


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def swish(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch.jit is deprecated, and people bring it
    scripted = torch.jit.script(swish)


def weight_norm_by_hook(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and people bring it
        return nn.utils.weight_norm(layer)


def masked_assignment(m: Any, x: torch.Tensor) -> torch.Tensor:
    h = m.l(x).clone()
    chosen = h > 0
    h[chosen] = h[chosen] * 2
    return h


def written_buffer(m: Any, x: torch.Tensor) -> torch.Tensor:
    h = m.l(x)
    m.cache[:, 1:3] = h[:1, 1:3]
    return h + m.cache


def out_of_buffer(m: Any, x: torch.Tensor) -> torch.Tensor:
    torch.mul(x.detach().mean((0, 1)), 2, out=m.b)
    return m.l(x) + m.b


def nested_branches(m: Any, x: torch.Tensor) -> torch.Tensor:
    def inner(t: torch.Tensor) -> torch.Tensor:
        return torch.cond(t.mean() > 1, lambda u: u + 1, lambda u: u * 3, (t,))

    return torch.cond(m.l(x).sum() > 0, inner, lambda t: t - 1, (m.l(x),))


def scanned(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    def step(state: torch.Tensor, row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        state = torch.tanh(m.o(state) + row)
        return state, state * 2

    return scan(step, x[:, 0] * 0, m.l(x), dim=1, reverse=True)


def unfolded(m: Any, x: torch.Tensor) -> torch.Tensor:
    patches = m.l(F.unfold(x, 2, stride=2).transpose(1, 2)).transpose(1, 2)
    return F.fold(patches, x.shape[2:], 2, stride=2)


def rotated(m: Any, x: torch.Tensor) -> torch.Tensor:
    pairs = torch.view_as_complex(m.l(x).reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * m.angles).flatten(-2)


def spectrum(m: Any, x: torch.Tensor) -> torch.Tensor:
    window = torch.hann_window(16)
    return m.l(torch.stft(x, 16, 8, window=window, return_complex=True).abs().transpose(1, 2))


def buffers(**tensors: torch.Tensor) -> Callable[[nn.Module], nn.Module]:
    def register(model: nn.Module) -> nn.Module:
        for name, tensor in tensors.items():
            model.register_buffer(name, tensor)
        return model

    return register


def calls(
    forward: Callable[..., Any], layer: nn.Module | None = None, prepare: Any = lambda m: m, **layers: Any
) -> Callable[[], nn.Module]:
    return lambda: prepare(Calls(forward, l=layer or nn.Linear(8, 8), **layers))


Case = tuple[Callable[[], nn.Module], tuple[int, ...], dict[int, str]]
X = (2, 5, 8)
CASES: dict[str, Case] = {
    "dataclass": (calls(lambda m, x: Out(m.l(x).sum(-1), (m.l(x), x))), X, TIME),
    "named tuple": (calls(lambda m, x: Pair(m.l(x), m.l(x).mean(1))), X, TIME),
    "tuple state": (
        calls(lambda m, x: m.c(m.l(x), (x, x * 0.5)), c=nn.LSTMCell(8, 8)), (2, 8), BATCH,
    ),
    "written buffer": (calls(written_buffer, prepare=buffers(cache=torch.zeros(1, 5, 8))), X, BATCH),
    "result written to a buffer": (calls(out_of_buffer, prepare=buffers(b=torch.zeros(8))), X, BATCH),
    "masked assignment": (calls(masked_assignment), X, TIME),
    "mean of what a mask selects": (calls(lambda m, x: m.l(x)[m.l(x).sum(-1) > 0].mean(0)), X, TIME),
    "einsum with an ellipsis": (
        calls(lambda m, x: torch.einsum("...id,...jd->...ij", m.l(x), x)), (2, 3, 5, 8), IMAGE,
    ),
    "unfold and fold": (calls(unfolded, nn.Linear(12, 12)), (2, 3, 8, 8), {0: "batch"}),
    "pixel shuffle": (
        calls(lambda m, x: F.pixel_unshuffle(F.pixel_shuffle(m.l(x), 2), 2)), (2, 4, 6, 8), BATCH,
    ),
    "grid sample": (
        calls(lambda m, x: F.grid_sample(m.l(x), x[:, 0, :, :2].unsqueeze(1).tanh(), align_corners=False)),
        (2, 3, 6, 8), IMAGE,
    ),
    "spectrum": (calls(spectrum, nn.Linear(9, 4)), (2, 64), BATCH),
    "complex buffer": (
        calls(rotated, prepare=buffers(angles=torch.polar(torch.ones(5, 4), torch.linspace(0, 1, 20).view(5, 4)))),
        X, BATCH,
    ),
    "complex parameter": (
        calls(lambda m, x: torch.view_as_real(torch.view_as_complex(m.l(x).reshape(-1, 4, 2)) @ m.p),
              p=nn.Parameter(torch.randn(4, 4, dtype=torch.complex64))),
        (2, 8), BATCH,
    ),
    "complex constant": (
        calls(lambda m, x: torch.view_as_real(m.l(x) * torch.tensor([1j, 2.0] * 4))), (2, 8), BATCH,
    ),
    "nested lists with keywords": (Blocks, X, TIME),
    "checkpointed": (calls(lambda m, x: checkpoint(m.l, x, use_reentrant=False)), X, TIME),
    "checkpointed, reentrant": (
        calls(lambda m, x: checkpoint(lambda t: m.l(t).relu(), x, use_reentrant=True)), X, TIME,
    ),
    "scripted function": (calls(lambda m, x: scripted(m.l(x))), X, TIME),
    "compiled layer": (
        calls(lambda m, x: m.b(m.l(x)), b=torch.compile(Block(), backend="eager")), X, TIME,
    ),
    "parallel layer": (calls(lambda m, x: m.b(m.l(x)), b=nn.DataParallel(Block())), X, TIME),
    "function of autograd": (calls(lambda m, x: Swish.apply(m.l(x))), X, TIME),
    "weight norm beside": (
        calls(lambda m, x: m.n(m.l(x)), n=parametrizations.weight_norm(nn.Linear(8, 8))), X, TIME,
    ),
    "spectral norm beside": (
        calls(lambda m, x: m.n(m.l(x)), n=parametrizations.spectral_norm(nn.Linear(8, 8))), X, TIME,
    ),
    "spectral norm by a hook beside": (
        calls(lambda m, x: m.n(m.l(x)), n=nn.utils.spectral_norm(nn.Conv1d(5, 5, 3))), X, BATCH,
    ),
    "batch norm without statistics": (
        calls(lambda m, x: m.n(m.l(x)), n=nn.BatchNorm2d(3, affine=False, track_running_stats=False)),
        (4, 3, 6, 8), BATCH,
    ),
    "instance and group norm": (
        calls(lambda m, x: m.g(m.n(m.l(x))), n=nn.InstanceNorm2d(3, track_running_stats=True), g=nn.GroupNorm(3, 3)),
        (4, 3, 6, 8), BATCH,
    ),
    "attention with weights": (
        calls(lambda m, x: m.a(m.l(x), x, x, need_weights=True), a=nn.MultiheadAttention(8, 2, batch_first=True)),
        X, TIME,
    ),
    "buckets": (
        calls(lambda m, x: m.e(torch.bucketize(m.l(x).mean(-1), torch.linspace(-1, 1, 6))) + m.l(x),
              e=nn.Embedding(7, 8)),
        X, TIME,
    ),
    "unique": (
        calls(lambda m, x: torch.unique((m.l(x) > 0).long(), return_inverse=True)[1] * m.l(x)), X, TIME,
    ),
    "scattered sum": (
        calls(lambda m, x: torch.zeros_like(x).scatter_add_(1, (x > 0).long(), m.l(x))), X, TIME,
    ),
    "loop over a fixed length": (
        calls(lambda m, x: torch.stack([torch.tanh(m.l(x[:, i])) for i in range(x.shape[1])], 1)), X, BATCH,
    ),
    "down and up": (
        calls(lambda m, x: m.u(F.silu(m.l(x))) + x, nn.Conv2d(3, 4, 3, stride=2, padding=1),
              u=nn.ConvTranspose2d(4, 3, 4, stride=2, padding=1)),
        (2, 3, 16, 16), BATCH,
    ),
    "pool and unpool": (
        calls(lambda m, x: F.max_unpool2d(*F.max_pool2d(m.l(x), 2, return_indices=True), 2),
              nn.Conv2d(3, 4, 3, padding=1)),
        (2, 3, 16, 16), BATCH,
    ),
    "branch": (
        calls(lambda m, x: torch.cond(x.sum() > 0, lambda t: m.o(t), lambda t: t - 1, (m.l(x),)), o=nn.Linear(8, 8)),
        X, TIME,
    ),
    "branch by a size": (
        calls(
            lambda m, x: torch.cond(x.shape[1] > 6, lambda t: m.o(t), lambda t: t - 1, (m.l(x),)), o=nn.Linear(8, 8)
        ),
        X, TIME,
    ),
    "branch within a branch": (calls(nested_branches), X, TIME),
    "branches with two results": (
        calls(lambda m, x: torch.cond(
            (m.l(x).sum() > 0).reshape(1), lambda t: (t * 2, t.sum(1)), lambda t: (t - 1, t.mean(1)), (m.l(x),)
        )),
        X, TIME,
    ),
    "scan": (calls(scanned, o=nn.Linear(8, 8)), X, BATCH),
    "halves of one": (calls(lambda m, x: F.glu(m.l(x), 1)), (3, 2, 8), {1: "time"}),
    "chain of products": (
        calls(lambda m, x: torch.linalg.multi_dot([m.l(x).T, x, m.l(x).T])), (5, 8), BATCH,
    ),
    "circular convolution": (
        calls(lambda m, x: F.pad(m.l(x), (2, 1, 1, 2), "reflect"),
              nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")),
        (2, 3, 16, 16), BATCH,
    ),
}  # fmt: skip
QUICK = {
    "branch",
    "dataclass",
    "complex buffer",
    "checkpointed, reentrant",
    "spectral norm beside",
    "result written to a buffer",
}


def compiled(
    model: nn.Module, x: torch.Tensor, dynamic: dict[int, str], target: str = "*l"
) -> adaptc.Compiled:
    return adaptc.compile(
        {"adapt": [{**LORA, "target": target}]}, model=model, example_inputs=(x,), dynamic={"x": dynamic}
    )


def tensors_of(outputs: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def test_a_module_is_right_at_other_sizes(name: str, tmp_path: Path) -> None:
    make, shape, dynamic = CASES[name]
    torch.manual_seed(0)
    model = make().eval()
    made = compiled(model, torch.randn(shape), dynamic)
    made.emit("onnx", tmp_path / "m.onnx")
    x = torch.randn([size + 2 if axis in dynamic else size for axis, size in enumerate(shape)])
    got = onnx_runner(tmp_path / "m.onnx")({"x": x})
    with torch.no_grad():
        trained, wanted = tensors_of(made.module.eval()(x)), tensors_of(model(x))
    assert len(wanted) == len(got) == len(trained) > 0
    for left, onnx, torch_module in zip(wanted, got, trained, strict=True):
        assert left.shape == onnx.shape == torch_module.shape
        assert near(left.float(), onnx.float())
        assert near(left.float(), torch_module.float())


def test_a_weight_that_training_normalises_is_trained_as_in_torch() -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return Calls(
            lambda m, x: m.n(m.l(x)), l=nn.Linear(8, 8), n=parametrizations.spectral_norm(nn.Linear(8, 8))
        )

    ours, theirs, x = (
        compiled(model(), torch.randn(2, 8), BATCH, "l").module.train(),
        model().train(),
        torch.randn(3, 8),
    )
    for _ in range(2):
        assert near(ours(x), theirs(x))
    buffers = dict(ours.named_buffers())
    for name, value in theirs.named_buffers():
        assert near(buffers[name], value)
    assert near(ours.eval()(x), theirs.eval()(x))


def test_a_branch_that_is_always_computed_is_told_and_trained() -> None:
    model = Calls(
        lambda m, x: torch.cond(x.sum() > 0, lambda t: m.l(t), lambda t: t - 1, (x,)), l=nn.Linear(8, 8)
    )
    made = compiled(model, torch.randn(2, 8), BATCH)
    assert made.plan.notes == [
        "both branches of torch.cond are computed, and one is selected (from small_models.py:27)"
    ]
    for sign, trained in ((1, True), (-1, False)):
        made.module.zero_grad()
        made.module(sign * torch.ones(3, 8)).sum().backward()
        gradients = [p.grad for p in made.module.parameters() if p.grad is not None]
        assert any(bool(gradient.any()) for gradient in gradients) == trained


def test_a_gradient_that_is_no_part_of_a_graph_is_told() -> None:
    made = compiled(Calls(lambda m, x: Swish.apply(m.l(x)), l=nn.Linear(8, 8)), torch.randn(2, 8), BATCH)
    (note,) = made.plan.notes
    assert note.startswith("the backward of Swish (")
    assert "class Swish(torch.autograd.Function):" in note
    assert note.endswith("training differentiates that instead")


class Symmetric(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.triu() + weight.triu(1).T


def symmetric(layer: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(layer, "weight", Symmetric())


PARAMETRIZED = "torch.nn.utils.parametrize.remove_parametrizations(model.l, 'weight')"
COMPUTED: dict[str, tuple[Callable[[nn.Module], nn.Module], str, str]] = {
    "weight norm": (parametrizations.weight_norm, "original0", PARAMETRIZED),
    "spectral norm": (parametrizations.spectral_norm, "original", PARAMETRIZED),
    "the author's": (symmetric, "original", PARAMETRIZED),
    "weight norm by a hook": (weight_norm_by_hook, "weight_g, weight_v", "torch.nn.utils.remove_weight_norm(model.l)"),
    "spectral norm by a hook": (
        nn.utils.spectral_norm, "weight_orig", "torch.nn.utils.remove_spectral_norm(model.l)",
    ),
    "pruned": (
        lambda layer: prune.l1_unstructured(layer, "weight", 0.3), "weight_orig",
        "torch.nn.utils.prune.remove(model.l, 'weight')",
    ),
}  # fmt: skip


WITH_CONVOLUTION = {"weight norm", "spectral norm by a hook"}


@pytest.mark.parametrize(
    ("name", "layer"),
    [(name, nn.Linear(8, 8)) for name in COMPUTED]
    + [(n, nn.Conv1d(5, 5, 3)) for n in sorted(WITH_CONVOLUTION)],
)
def test_a_layer_whose_weight_is_computed_is_refused_in_words(name: str, layer: nn.Module) -> None:
    wrap, part, mend = COMPUTED[name]
    model = Calls(
        lambda m, x: m.l(x).sum(-1) + m.o(x[:, 0]).sum(-1, keepdim=True),
        l=wrap(deepcopy(layer)),
        o=nn.Linear(8, 8),
    )
    with pytest.raises(SpecError) as error:
        compiled(model, torch.randn(2, 5, 8), BATCH, "l")
    text = str(error.value)
    assert f"l ({type(model.l).__name__}, small_models.py:" in text
    assert all(
        words in text for words in ("has no stored weight: it computes one from", part, f"call {mend}")
    )
    notes = compiled(model, torch.randn(2, 5, 8), BATCH, "*").plan.notes
    assert any(note.startswith("adapt.0: left out: l (") and mend in note for note in notes)


def test_a_layer_is_adapted_once_its_weight_is_stored(tmp_path: Path) -> None:
    model = Calls(lambda m, x: m.l(x), l=parametrizations.weight_norm(nn.Linear(8, 8)))
    parametrize.remove_parametrizations(model.l, "weight")  # type: ignore[arg-type]
    made = compiled(model, torch.randn(2, 8), BATCH)
    assert [site.module for site in made.plan.entries[0].selection.sites] == ["l"]


def quantized() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(8, 8)), {nn.Linear})


REFUSED: dict[str, tuple[Callable[..., Any], dict[str, Any], torch.dtype, str]] = {
    "complex output": (
        lambda m, x: torch.fft.fft(m.l(x)), {}, torch.float32,
        "output output is complex, and ONNX Runtime takes and gives real numbers only\n"
        "  from small_models.py:LINE\n  let forward return torch.view_as_real of it",
    ),
    "complex input": (
        lambda m, x: m.l(torch.view_as_real(x).sum(-1)), {}, torch.complex64,
        "input x is complex, and ONNX Runtime takes and gives real numbers only\n"
        "  let forward take its real and imaginary parts",
    ),
    "loop over values": (
        lambda m, x: while_loop(lambda t: t.sum() < 3, lambda t: (t + 1,), (m.l(x),))[0], {}, torch.float32,
        "the trace holds while_loop, which is no operation on tensors\n  from small_models.py:LINE\n"
        "  a graph has no loops: run the largest number of steps, and let torch.where keep each value once it is done",
    ),
    "branches of other shapes": (
        lambda m, x: torch.cond(x.sum() > 6, lambda t: t[:2] + 1, lambda t: t * 2, (m.l(x),)), {}, torch.float32,
        "the trace holds cond, which is no operation on tensors\n  from small_models.py:LINE\n"
        "  a graph has no branches: both of torch.cond are computed",
    ),
    "scan over any size": (
        lambda m, x: scan(lambda c, t: (c + t, c * t), m.l(x)[0] * 0, m.l(x))[1], {}, torch.float32,
        "the trace holds scan, which is no operation on tensors\n  from small_models.py:LINE\n"
        "  a graph has no loops: write the size that scan runs over as a number, so that its steps are written out",
    ),
    "quantized layer": (
        lambda m, x: m.q(m.l(x)), {"q": quantized}, torch.float32,
        "q.0 is a quantized module of torch (Linear), which torch.export does not trace\n"
        "  hand in the model as it was before torch quantized it, and quantize it by `quantize` in the spec",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_module_is_refused_in_words(name: str, tmp_path: Path) -> None:
    forward, layers, dtype, text = REFUSED[name]
    model = Calls(forward, l=nn.Linear(8, 8), **{key: make() for key, make in layers.items()})
    with pytest.raises(AdaptcError) as error:
        compiled(model, torch.randn(2, 8, dtype=dtype), BATCH).emit("onnx", tmp_path / "m.onnx")
    assert text in re.sub(r"(small_models.py:)\d+", r"\1LINE", str(error.value))
