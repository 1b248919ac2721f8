"""Plain modules, one for each kind of place that can be adapted, and by hand how each of their weights is a matrix."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from adaptc.compiler.compiled import Compiled
from adaptc.compiler.plan.plan import make_plan
from adaptc.compiler.plan.report import plan_report
from adaptc.compiler.program import Program
from adaptc.compiler.rewrite import rewrite
from adaptc.ir.graph import Graph
from adaptc.methods.method import METHODS
from adaptc.spec.spec import load
from adaptc.tracing.module import from_examples
from adaptc.tracing.trace import trace_base as trace
from tests.families import Drawn, randomise

WIDTH, WORDS, PADDING = 16, 24, 3
SHAPES = ((3, 11), (1, 1), (2, 7))
"""(batch, sequence); the first is the one traced."""
Build = Callable[[], nn.Module]


@dataclass(frozen=True)
class Matrix:
    """One adapted weight, as it is read by hand.

    `axes`: a letter for each stored axis, `o` for rows, `i` for columns, `e` for matrices side by side. `rows`: of a
    slice, the rows it is made of.
    """

    parameter: str
    axes: str = "oi"
    rows: tuple[tuple[int, int], ...] = ()

    def read(self, W: torch.Tensor) -> torch.Tensor:
        """(matrices, rows, columns)"""
        moved = W.permute(self._order).reshape(self._sizes(W))
        return torch.cat([moved[:, a:b] for a, b in self.rows], 1) if self.rows else moved

    def write(self, W: torch.Tensor, M: torch.Tensor) -> torch.Tensor:
        """W with M in place of what `read` gave."""
        if self.rows:
            whole = W.permute(self._order).reshape(self._sizes(W)).clone()
            whole[:, [row for a, b in self.rows for row in range(a, b)]] = M
            M = whole
        order = self._order
        return M.reshape([W.shape[i] for i in order]).permute([order.index(i) for i in range(W.dim())])

    @property
    def _order(self) -> list[int]:
        return [i for letter in "eoi" for i, axis in enumerate(self.axes) if axis == letter]

    def _sizes(self, W: torch.Tensor) -> list[int]:
        return [math.prod(W.shape[i] for i, a in enumerate(self.axes) if a == letter) for letter in "eoi"]


@dataclass(frozen=True)
class Kind:
    """A module that is called with `x (batch, sequence, 16)`, or with `ids (batch, sequence)`."""

    build: Build
    targets: tuple[str, ...]
    """What is adapted, below the module."""
    matrices: tuple[Matrix, ...]
    site: str = "linear"
    """The kind of site that it is."""
    ids: bool = False
    layer: str = ""
    """The class of layer that PEFT knows it as; `parameter` where it takes it by the parameter's name."""
    refused: frozenset[str] = frozenset()
    """The methods that cannot compute what they should on it."""

    def in_peft(self, method: str) -> bool:
        return self.layer in IN_PEFT.get(method, ())

    def takes(self, method: str) -> bool:
        kinds = METHODS[method].kinds
        return method not in self.refused and bool(kinds & {self.site, "parameter"})


class Convolutional(nn.Module):
    """A convolution over the sequence, its 16 features shaped (channels, *space)."""

    def __init__(self, l: nn.Module, *space: int) -> None:  # noqa: E741
        super().__init__()
        self.l, self.space = l, space

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.l(x.transpose(1, 2).reshape(x.shape[0], -1, *self.space, x.shape[1]))


class Layer(nn.Module):
    """`run(x, layer)`."""

    def __init__(self, l: nn.Module, run: Callable[..., torch.Tensor] | None = None) -> None:  # noqa: E741
        super().__init__()
        self.l, self.run = l, run

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x, self.l) if self.run else self.l(x)


class Bare(nn.Module):
    """`run(x, W)` for a parameter of its own."""

    def __init__(self, run: Callable[..., torch.Tensor], *shape: int) -> None:
        super().__init__()
        self.W, self.run = nn.Parameter(torch.empty(shape)), run

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x, self.W)


class Attention(nn.Module):
    """`nn.MultiheadAttention`, of x on itself or on something narrower."""

    def __init__(self, cross: bool = False, batch_first: bool = True, **options: Any) -> None:
        super().__init__()
        sizes = {"kdim": 6, "vdim": 5} if cross else {}
        self.attn = nn.MultiheadAttention(WIDTH, 4, batch_first=batch_first, **sizes, **options)
        self.cross, self.batch_first = cross, batch_first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.batch_first:
            x = x.transpose(0, 1)
        key, value = (x[..., :6], x[..., -5:]) if self.cross else (x, x)
        y = self.attn(x, key, value, need_weights=False)[0]
        return y if self.batch_first else y.transpose(0, 1)


class Fused(nn.Module):
    """One projection for query, key and value; of key and value there is one head, of query there are two."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(WIDTH, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.l(x).split([16, 8, 8], -1)
        q = q.unflatten(-1, (2, 8)).transpose(1, 2)
        k, v = k.unsqueeze(1).expand(-1, 2, -1, -1), v.unsqueeze(1).expand(-1, 2, -1, -1)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 24, batch_first=True)
    return nn.TransformerEncoder(layer, 1)


def _conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(12, WIDTH)


def _gathered(x: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    flat = x.reshape(-1, WIDTH)
    chosen = (flat[:, 0] > 0).long() + 2 * (flat[:, 1] > 0).long()
    return torch.bmm(W[chosen], flat.unsqueeze(-1)).squeeze(-1).reshape(*x.shape[:-1], -1)


def _per_head(x: torch.Tensor) -> torch.Tensor:
    """(4, batch * sequence, 4)"""
    return x.reshape(-1, 4, 4).transpose(0, 1)


SCALING = frozenset({"ia3"})
CONVOLUTIONS = frozenset({"Conv1d", "Conv2d", "Conv3d"})
PLAIN, STORED, SQUARE = frozenset({"Linear"}), frozenset({"Linear", "Conv1D"}), frozenset({"Linear"})
EVERYWHERE = STORED | CONVOLUTIONS | {"Embedding"}
IN_PEFT = {
    "lora": EVERYWHERE | {"parameter"},
    **dict.fromkeys(("dora", "dylora", "hira"), EVERYWHERE),
    "ia3": STORED | {"Conv2d", "Conv3d"},
    "adalora": STORED | {"Conv2d"},
    **dict.fromkeys(("loha", "lokr"), PLAIN | {"Conv1d", "Conv2d", "grouped Conv1d"}),
    **dict.fromkeys(("vera", "fourierft", "gralora", "randlora", "vblora"), STORED),
    "oft": SQUARE | {"Embedding"},
    **dict.fromkeys(("boft", "hra"), SQUARE),
    **dict.fromkeys(("miss", "c3a", "road", "delora", "shira"), PLAIN),
    "trainable-tokens": frozenset({"Embedding"}),
}
"""The layers that PEFT has a method for, read from its source; convolutions here are not square."""


def _conv(build: Build, axes: str, *space: int, **more: Any) -> Kind:
    return Kind(lambda: Convolutional(build(), *space), ("l",), (Matrix("l.weight", axes),), "conv", **more)


def _bare(run: Callable[..., torch.Tensor], axes: str, *shape: int, **more: Any) -> Kind:
    site = "experts" if "e" in axes else "linear"
    return Kind(lambda: Bare(run, *shape), ("W",), (Matrix("W", axes),), site, **more)


def _linear(build: Build, *targets: str, axes: str = "oi", **more: Any) -> Kind:
    return Kind(build, targets or ("l",), (Matrix("l.weight", axes),), **more)


def _attention(*weights: str, cross: bool = False, **options: Any) -> Kind:
    targets = tuple(f"attn.{w.removesuffix('.weight')}" for w in weights)
    return Kind(
        lambda: Attention(cross, **options),
        targets,
        tuple(Matrix(f"attn.{w}") for w in weights),
        refused=SCALING if cross else frozenset(),
    )


KINDS: dict[str, Kind] = {
    "conv1d": _conv(
        lambda: nn.Conv1d(16, 24, 3, stride=2, padding=1, dilation=1), "oii", layer="Conv1d"
    ),
    "conv2d": _conv(
        lambda: nn.Conv2d(8, 12, (2, 3), padding=(0, 2), dilation=(1, 2)), "oiii", 2,
        layer="Conv2d",
    ),
    "conv3d": _conv(
        lambda: nn.Conv3d(4, 12, (2, 1, 3), padding=(0, 0, 1), bias=False), "oiiii", 2, 2,
        layer="Conv3d",
    ),
    "conv-same": _conv(lambda: nn.Conv1d(16, 16, 3, padding="same"), "oii", layer="Conv1d"),
    "conv-circular": _conv(
        lambda: nn.Conv2d(8, 12, (2, 3), padding=1, padding_mode="circular"), "oiii", 2,
        layer="Conv2d",
    ),
    "conv-grouped": _conv(lambda: nn.Conv1d(16, 12, 3, padding=1, groups=2), "oii", layer="grouped Conv1d"),
    "conv-depthwise": _conv(lambda: nn.Conv1d(16, 32, 3, padding=1, groups=16), "oii", layer="grouped Conv1d"),
    "conv-transposed": _conv(
        lambda: nn.ConvTranspose2d(8, 5, 3, stride=2, padding=(0, 1), output_padding=1), "ioii", 2,
            ),
    "conv-transposed-grouped": _conv(
        lambda: nn.ConvTranspose1d(16, 6, 3, padding=1, groups=2, bias=False), "ioi", refused=SCALING
    ),
    "embedding": Kind(
        lambda: Layer(nn.Embedding(WORDS, WIDTH, padding_idx=PADDING)), ("l",), (Matrix("l.weight", "io"),),
        "embedding", ids=True, layer="Embedding",
    ),
    "linear": _linear(lambda: Layer(nn.Linear(WIDTH, 12)), layer="Linear"),
    "conv1d-gpt2": _linear(lambda: Layer(_conv1d()), axes="io", layer="Conv1D"),
    "twice": _linear(
        lambda: Layer(nn.Linear(WIDTH, WIDTH), lambda x, layer: layer(torch.tanh(layer(x)))),
        layer="Linear",
    ),
    "turned": _linear(
        lambda: Layer(nn.Linear(WIDTH, 12, bias=False), lambda x, layer: x @ layer.weight.t()),
        layer="Linear",
    ),
    "fused-rows": Kind(
        Fused, ("l[3:9]", "l[24:]"),
        (Matrix("l.weight", rows=((3, 9),)), Matrix("l.weight", rows=((24, 32),))),
    ),
    "fused-roles": Kind(
        Fused, ("l[q,v]",), (Matrix("l.weight", rows=((0, 16),)), Matrix("l.weight", rows=((24, 32),)))
    ),
    "sliced": _bare(lambda x, W: F.linear(x, W[4:12]), "oi", 20, WIDTH, layer="parameter"),
    "right": _bare(lambda x, W: x @ W, "io", WIDTH, 12),
    "left": _bare(lambda x, W: W @ x.transpose(1, 2), "oi", 12, WIDTH, layer="parameter"),
    "addmm": _bare(
        lambda x, W: torch.addmm(x.new_ones(12), x.reshape(-1, WIDTH), W, beta=0.5, alpha=2), "io", WIDTH, 12,
        refused=SCALING,
    ),
    "einsum": _bare(lambda x, W: torch.einsum("bsi,oi->bso", x, W), "oi", 12, WIDTH, layer="parameter"),
    "einsum-turned": _bare(lambda x, W: torch.einsum("bsi, io -> bso", x, W), "io", WIDTH, 12),
    "einsum-first": _bare(lambda x, W: torch.einsum("oi,bsi->bso", W, x), "oi", 12, WIDTH, layer="parameter"),
    "einsum-heads": _bare(lambda x, W: torch.einsum("bsi,ihd->bshd", x, W), "ioo", WIDTH, 3, 4),
    "einsum-merge": _bare(
        lambda x, W: torch.einsum("bshd,hdo->bso", x.unflatten(-1, (4, 4)), W), "iio", 4, 4, 12
    ),
    "einsum-side-by-side": _bare(lambda x, W: torch.einsum("bsi,eoi->bseo", x, W), "ooi", 3, 12, WIDTH),
    "einsum-per-head": _bare(
        lambda x, W: torch.einsum("bshi,hio->bsho", x.unflatten(-1, (2, 8)), W), "eio", 2, 8, 12
    ),
    "bmm-expanded": _bare(
        lambda x, W: torch.bmm(x, W.unsqueeze(0).expand(x.shape[0], -1, -1)), "io", WIDTH, 12
    ),
    "experts-in-out": _bare(lambda x, W: torch.bmm(_per_head(x), W), "eio", 4, 4, 12),
    "experts-out-in": _bare(lambda x, W: torch.bmm(_per_head(x), W.mT), "eoi", 4, 12, 4, layer="parameter"),
    "experts-matmul": _bare(lambda x, W: torch.matmul(x.unsqueeze(1), W), "eio", 3, WIDTH, 12),
    "experts-baddbmm": _bare(
        lambda x, W: torch.baddbmm(x.new_ones(4, 1, 12), _per_head(x), W), "eio", 4, 4, 12
    ),
    "experts-gathered": _bare(_gathered, "eoi", 4, 12, WIDTH, layer="parameter"),
    "experts-one-by-one": _bare(
        lambda x, W: torch.cat([F.linear(x, W[0]), F.linear(x, W[-1]), x @ W[1].t()], -1), "eoi", 3, 12, WIDTH,
        layer="parameter",
    ),
    "attention": _attention("in_proj_weight", "out_proj.weight"),
    "attention-batch-second": _attention("in_proj_weight", "out_proj.weight", batch_first=False, bias=False),
    "attention-cross": _attention(
        "q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight", cross=True
    ),
    "attention-rows": Kind(
        Attention, ("attn[v]", "attn.out_proj"),
        (Matrix("attn.in_proj_weight", rows=((32, 48),)), Matrix("attn.out_proj.weight")),
    ),
    "encoder": Kind(
        lambda: Layer(_encoder()), ("l.layers.0.*",),
        tuple(
            Matrix(f"l.layers.0.{w}")
            for w in ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")
        ),
            ),
}  # fmt: skip


class Museum(nn.Module):
    """Several kinds side by side: gives the result of each by its name."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.kinds = nn.ModuleDict({name: KINDS[name].build() for name in names})

    def forward(
        self, x: torch.Tensor | None = None, ids: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        return {name: kind(ids if KINDS[name].ids else x) for name, kind in self.kinds.items()}


def inputs(
    names: Sequence[str], batch: int, length: int, seed: int = 0, pad: bool = True
) -> dict[str, torch.Tensor]:
    """Random inputs of those kinds; with `pad`, the padding word is among the others."""
    generator = torch.Generator().manual_seed(2000 + seed)
    found = {}
    if not all(KINDS[name].ids for name in names):
        found["x"] = torch.randn(batch, length, WIDTH, generator=generator)
    if any(KINDS[name].ids for name in names):
        found["ids"] = torch.randint(PADDING + 1, WORDS, (batch, length), generator=generator)
        found["ids"][0, 0] = WORDS - 1  # as many words as there are
        if pad:
            found["ids"][-1, -1] = PADDING
    return found


def entry(method: str, names: Sequence[str], **options: Any) -> dict[str, Any]:
    """An `adapt` entry of a method on those kinds."""
    targets = [target for name in names for target in _targets(method, name)]
    fields = METHODS[method].__dataclass_fields__  # type: ignore[attr-defined]
    ranks = {k: v for k, v in {"r": 2, "alpha": 3, "init_r": 2}.items() if k in fields}
    return {"method": method, "target": targets, **ranks, **METHODS[method].small, **options}


def _targets(method: str, name: str) -> list[str]:
    """For a method of whole modules those, without the slices."""
    if "parameter" not in METHODS[method].kinds:
        return [f"kinds.{name}.{target}" for target in KINDS[name].targets]
    owners = [f"kinds.{name}.{m.parameter}".rpartition(".")[0] for m in KINDS[name].matrices]
    return list(dict.fromkeys(owners))


class Museums:
    """Every set of kinds that a test asks for: built and traced once."""

    def __init__(self) -> None:
        self._models: dict[tuple[str, ...], nn.Module] = {}
        self._graphs: dict[tuple[str, ...], Graph] = {}

    def model(self, *names: str) -> nn.Module:
        """The module itself, in evaluation mode; not to be changed."""
        if names not in self._models:
            torch.manual_seed(0)
            self._models[names] = randomise(Museum(names)).eval()
        return self._models[names]

    def fresh(self, *names: str) -> nn.Module:
        """A copy that a test may change."""
        return copy.deepcopy(self.model(*names))

    def graph(self, *names: str) -> Graph:
        """The traced graph; not to be changed."""
        if names not in self._graphs:
            examples = inputs(names, *SHAPES[0])
            axes = {0: "batch", 1: "seq"}
            base = from_examples(self.model(*names), examples, dict.fromkeys(examples, axes))
            self._graphs[names] = graph = trace(base)
            graph.fisher_information = Drawn(graph)  # type: ignore[assignment]
        return self._graphs[names]

    def compiled(self, names: Sequence[str], *adapt: Any) -> Compiled:
        """`adaptc.compile` on what is traced already."""
        spec = load({"adapt": list(adapt)})
        graph = self.graph(*names)
        plan = make_plan(spec, graph)
        rewritten = rewrite(spec, graph, plan)
        return Compiled(Program(spec, plan_report(spec, graph, plan, rewritten), graph, rewritten))
