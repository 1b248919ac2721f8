"""The bases the laws are tested on: tiny, random, and non-zero in every weight."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adaptc.compiler.base import make_base
from adaptc.compiler.compiled import Compiled
from adaptc.compiler.driver import program_of
from adaptc.ir.graph import Graph
from adaptc.ir.module import bind
from adaptc.methods.method import METHODS
from adaptc.quantization.scheme import SCHEMES
from adaptc.spec.spec import load
from adaptc.tracing.module import from_examples
from adaptc.tracing.trace import trace_base as trace
from adaptc.weights import Held, seeded
from tests import hugging_face
from tests.traces import Traces

VOCABULARY = hugging_face.VOCABULARY
EPSILONS = 512
"""Tolerated error in units of the dtype's machine epsilon, relative to the largest reference value."""


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """No zero, no one and no two equal values anywhere, so that no mistake hides behind them."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * 0.1
        is_scale = parameter.dim() == 1 and name.endswith("weight")
        parameter.data.copy_(noise + 1 if is_scale else noise)
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
        if name.endswith("running_var"):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return module


class Mlp(nn.Module):
    """Linear layers with batch norm and dropout between them."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 32)
        self.norm = nn.BatchNorm1d(32)
        self.drop = nn.Dropout(0.2)
        self.mid = nn.Linear(32, 24, bias=False)
        self.down = nn.Linear(24, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.drop(F.relu(self.norm(self.up(x))))
        return self.down(F.gelu(self.mid(x)))


class Block(nn.Module):
    """A transformer block written by hand: attention is matmul and softmax."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 48), nn.Linear(48, width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        h = self.norm1(x)
        q, k, v = (
            f(h).view(batch, length, self.heads, -1).transpose(1, 2)
            for f in (self.query, self.key, self.value)
        )
        scores = torch.matmul(q, k.transpose(-1, -2)) / (width // self.heads) ** 0.5
        scores = scores.masked_fill(mask[:, None, None, :] == 0, -1e4)
        mixed = torch.matmul(self.drop(torch.softmax(scores, -1)), v)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.narrow(self.drop(F.gelu(self.wide(self.norm2(x)))))


class Matmul(nn.Module):
    """`x @ W + b`, W stored (in, out)."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(inner, outer)), nn.Parameter(torch.empty(outer))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


class Addmm(Matmul):
    """`addmm(b, x, W)` on a flattened view, as GPT-2 does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        return flat.view(*x.shape[:-1], self.weight.shape[1])


class Raw(nn.Module):
    """Matrix products without `nn.Linear`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Matmul(16, 24), Addmm(24, 32)
        self.third = Matmul(32, 16)
        self.last = nn.Linear(16, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.second(torch.tanh(self.first(x))))
        x = torch.mm(x.reshape(-1, 32), self.third.weight).reshape(*x.shape[:-1], 16)
        return self.last(torch.tanh(x))


@dataclass(frozen=True)
class Family:
    """A base and what is adapted in it."""

    build: Callable[[], nn.Module]
    target: tuple[str, ...]
    feedforward: tuple[str, ...]
    whole: tuple[str, ...]
    """Modules for methods that take whole modules."""
    task: str | None = None
    output: str = "logits"


def _hugging_face(name: str, target: Sequence[str], feedforward: str, whole: Sequence[str]) -> Family:
    model = hugging_face.MODELS[name]
    return Family(model.build, tuple(target), (feedforward,), tuple(whole), model.task)


PROJECTIONS = ("*_proj",)
ATTENTION_AND_FORWARD = ("*.q_proj", "*.v_proj", "*.out_proj", "*.fc1", "*.fc2")
DECODER_ONLY = (PROJECTIONS, "*.down_proj", ("*.layers.0.mlp", "model.norm"))
FAMILIES = {
    "llama": _hugging_face("llama", *DECODER_ONLY),
    "gpt2": _hugging_face(
        "gpt2", ("*.c_attn", "*.c_proj", "*.c_fc"), "*.mlp.c_proj", ("*.h.0.mlp", "*.ln_f")
    ),
    "bert": _hugging_face(
        "bert", ("*.query", "*.value", "*.dense"), "*.output.dense", ("classifier", "*.layer.1.output")
    ),
    "t5": _hugging_face(
        "t5", ("*.q", "*.v", "*.wi", "*.wo"), "*.wo", ("decoder.block.1", "encoder.final_layer_norm")
    ),
    "mlp": Family(Mlp, ("up", "mid", "down"), ("down",), ("down", "norm"), output="output"),
    "block": Family(
        Block,
        ("query", "key", "value", "out", "wide", "narrow"),
        ("narrow",),
        ("out", "norm1"),
        output="output",
    ),
    "raw": Family(
        Raw, ("first", "second", "third", "last"), ("second",), ("second", "last"), output="output"
    ),
    "qwen3": _hugging_face("qwen3", *DECODER_ONLY),
    "mistral": _hugging_face("mistral", *DECODER_ONLY),
    "gemma2": _hugging_face("gemma2", *DECODER_ONLY),
    "roberta": _hugging_face(
        "roberta", ("*.query", "*.value", "*.dense"), "*.output.dense", ("classifier", "*.layer.1.output")
    ),
    "bart": _hugging_face(
        "bart", ATTENTION_AND_FORWARD, "*.fc2", ("model.decoder.layers.1", "*.encoder.layernorm_embedding")
    ),
    "vit": _hugging_face(
        "vit", ("*.q_proj", "*.v_proj", "*.fc1", "*.fc2"), "*.fc2", ("classifier", "vit.layernorm")
    ),
    "mixtral": _hugging_face(
        "mixtral", ("*.self_attn.*_proj",), "*.o_proj", ("*.layers.0.mlp.experts", "*.mlp.gate")
    ),
    "whisper": _hugging_face(
        "whisper", ATTENTION_AND_FORWARD, "*.fc2", ("model.decoder.layers.1", "model.encoder.layer_norm")
    ),
    "resnet": _hugging_face(
        "resnet",
        ("*.convolution", "classifier.1"),
        "*.shortcut.convolution",
        ("classifier.1", "*.stages.1.layers.0.shortcut"),
    ),
}
HUGGING_FACE = tuple(name for name, family in FAMILIES.items() if family.task)
PLAIN = tuple(name for name, family in FAMILIES.items() if not family.task)
DECODERS = ("llama", "gpt2", "qwen3", "mistral", "gemma2", "mixtral")
"""The families that write texts, and take the position of each token."""
QUICK = ("llama", "bert", *PLAIN)
"""The families that stand for all in the quick laws."""
KEPT = 16
"""So many compiled models are kept at a time: the laws of one method on one base run after one another."""
SHAPES = ((2, 7), (1, 5), (4, 1), (1, 1))
"""(batch, sequence) other than traced; the first is padded, among the others are one row and one token."""


def marked(names: Iterable[str], quick: Iterable[str] = QUICK) -> list[Any]:
    """Families as parameters of a law: those that others stand for are slow."""
    kept = tuple(quick)
    return [name if name in kept else pytest.param(name, marks=pytest.mark.slow) for name in names]


def inputs(
    name: str, batch: int = 2, length: int = 7, pad: bool = False, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Random inputs of a family; with `pad`, the last row is padded on the right."""
    generator = torch.Generator().manual_seed(1000 + seed)

    def ids(*shape: int) -> torch.Tensor:
        return torch.randint(3, VOCABULARY, shape, generator=generator)

    mask = torch.ones(batch, length, dtype=torch.int64)
    if pad and length > 1:
        mask[-1, -(length // 2) :] = 0
    if name == "mlp":
        return {"x": torch.randn(batch, 16, generator=generator)}
    if name == "raw":
        return {"x": torch.randn(batch, length, 16, generator=generator)}
    if name == "block":
        return {"x": torch.randn(batch, length, 32, generator=generator), "mask": mask}
    if name in ("vit", "resnet"):
        sides = (24, 24) if name == "vit" else (length + 9, 2 * length + 5)
        return {"pixel_values": torch.randn(batch, 3, *sides, generator=generator)}
    if name == "whisper":
        features = torch.randn(batch, 8, 24, generator=generator)
        return {"input_features": features, "decoder_input_ids": ids(batch, length)}
    found = {"input_ids": ids(batch, length), "attention_mask": mask}
    if name == "bert":
        found["token_type_ids"] = torch.randint(0, 2, (batch, length), generator=generator)
    if name in DECODERS:
        found["position_ids"] = torch.arange(length).expand(batch, length)
    if name in ("t5", "bart"):
        found["decoder_input_ids"] = ids(batch, length + 2)
    return found


def close(got: torch.Tensor, want: torch.Tensor, epsilons: float = EPSILONS, dtype: Any = None) -> None:
    """Equal to within a number of the dtype's epsilons, relative to the largest reference value."""
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    if not want.dtype.is_floating_point:
        assert torch.equal(got, want)
        return
    kind = dtype or want.dtype
    got, want = got.detach().double(), want.detach().double()
    assert torch.isfinite(want).all()
    scale = want.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    error = float((got - want).abs().max() / scale) / torch.finfo(kind).eps
    assert error <= epsilons, f"off by {error:.1f} eps of {kind}, {epsilons} allowed"


def differs(got: torch.Tensor, want: torch.Tensor) -> None:
    """Not equal, by far more than rounding: guards a comparison against being empty."""
    scale = want.detach().abs().max()
    eps = torch.finfo(want.dtype).eps
    assert float((got - want).detach().abs().max() / scale) > 4 * EPSILONS * eps, "nothing was changed"


def outputs(
    module: nn.Module, tensors: Mapping[str, torch.Tensor], names: Sequence[str], **more: Any
) -> dict[str, torch.Tensor]:
    """The outputs of a model by the names a graph gives them."""
    result = module(**tensors, **more)
    if isinstance(result, torch.Tensor):
        result = {names[0]: result}
    return {name: result[name] for name in names}


def without_cache(module: nn.Module) -> dict[str, bool]:
    """The argument that turns off a Hugging Face model's cache, if it has one."""
    return {"use_cache": False} if "use_cache" in inspect.signature(module.forward).parameters else {}


def perturbed(values: Mapping[str, torch.Tensor], seed: int = 5) -> dict[str, torch.Tensor]:
    """Add noise to every adapter, deterministically, so that none is the identity."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (value + 0.1 * torch.randn(value.shape, generator=generator)).to(value.dtype)
        for name, value in values.items()
    }


def perturb(module: nn.Module, seed: int = 5) -> None:
    """Add noise to everything trained."""
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, value in perturbed(trained, seed).items():
            trained[name].copy_(value)


@cache
def field_names(method: str) -> frozenset[str]:
    return frozenset(f.name for f in dataclasses.fields(METHODS[method]))  # type: ignore[arg-type]


def scheme_entry(name: str) -> dict[str, Any]:
    """A `quantize` entry of a scheme, without its target, with options that fit small layers."""
    return {"method": name, **SCHEMES[name].small}


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Random numbers as a trained weight has them: small, and not around zero."""
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed)) * 0.1 + 0.01


EMBEDDINGS = ("*wte", "*word_embeddings", "*embed_tokens", "shared")


def small(method: str) -> dict[str, Any]:
    """The options of a method that fit layers as small as those here."""
    ranks = {"r": 4} if "r" in field_names(method) else {}
    return {**ranks, **METHODS[method].small}


def entry(method: str, family: str, **options: Any) -> dict[str, Any]:
    """An `adapt` entry of a method for a family."""
    base, kinds = FAMILIES[family], METHODS[method].kinds
    target = EMBEDDINGS if kinds == {"embedding"} else base.whole if "parameter" in kinds else base.target
    target = ("*",) if METHODS[method].everywhere else target
    shares = {"on_alias": "share"} if kinds == {"embedding"} else {}
    found: dict[str, Any] = {"method": method, "target": list(target), **shares, **small(method)}
    if "feedforward" in field_names(method):
        found["feedforward"] = list(base.feedforward)
    return found | options


@dataclass(frozen=True)
class Drawn:
    """Fisher information drawn at random, in place of an estimate."""

    graph: Graph

    def __call__(self, name: str) -> torch.Tensor:
        return torch.rand(self.graph.weights[name].shape, generator=seeded(0, name))

    def of(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        return {name: self(name) for name in names}


def evaluate(graph: Graph, tensors: dict[str, torch.Tensor], module: Any = None) -> dict[str, torch.Tensor]:
    """The outputs of a graph, or of a module made of it, by name."""
    with torch.no_grad():
        return outputs(module or bind(graph).eval(), tensors, graph.outputs)


class Zoo:
    """Every family: built, saved and traced once."""

    def __init__(self, root: Path, traces: Traces) -> None:
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.root, self._traces = root, traces
        self._eager: dict[str, nn.Module] = {}
        self._graphs: dict[tuple[str, str | None], Graph] = {}
        self._compiled: dict[tuple[str, str], Compiled] = {}

    def eager(self, name: str) -> nn.Module:
        """The model itself, in evaluation mode; not to be changed."""
        if name not in self._eager:
            torch.manual_seed(0)
            model = randomise(FAMILIES[name].build())
            if hasattr(model, "tie_weights"):
                model.tie_weights()
            if FAMILIES[name].task:
                model.save_pretrained(self.root / name)
            self._eager[name] = model.eval()
            self._traces.share(model)
        return self._eager[name]

    def fresh(self, name: str) -> nn.Module:
        """A copy that a test may change."""
        return copy.deepcopy(self.eager(name))

    def directory(self, name: str) -> Path:
        """Where a Hugging Face model is saved."""
        self.eager(name)
        return self.root / name

    def base_of(self, name: str, **more: Any) -> dict[str, Any]:
        """The `base` of a spec."""
        return {"model": str(self.directory(name)), "task": FAMILIES[name].task, **more}

    def run_eager(
        self, name: str, tensors: Mapping[str, torch.Tensor], model: nn.Module | None = None
    ) -> dict[str, torch.Tensor]:
        """The outputs of the eager model."""
        module = model or self.eager(name)
        return outputs(module, tensors, self.graph(name).outputs, **without_cache(module))

    def graph(self, name: str, dtype: str | None = None) -> Graph:
        """The traced graph; not to be changed."""
        if (name, dtype) not in self._graphs:
            if FAMILIES[name].task:
                base = make_base(load({"base": self.base_of(name, **({"dtype": dtype} if dtype else {}))}))
            else:
                model = self.eager(name)
                if dtype:
                    model = self.fresh(name).to(getattr(torch, dtype))
                examples = inputs(name, 3, 11)
                if dtype:
                    examples["x"] = examples["x"].to(getattr(torch, dtype))
                base = from_examples(model, examples, self.dynamic(name))
            self._graphs[name, dtype] = graph = trace(base)
            graph.fisher_information = Drawn(graph)  # type: ignore[assignment]
        return self._graphs[name, dtype]

    def dynamic(self, name: str) -> dict[str, dict[int, str]]:
        """The dynamic dimensions of a plain module's inputs."""
        axes = {0: "batch"} if name == "mlp" else {0: "batch", 1: "seq"}
        return dict.fromkeys(inputs(name), axes)

    def compiled(
        self, name: str, adapt: Sequence[Mapping[str, Any]], dtype: str | None = None, **spec: Any
    ) -> Compiled:
        """`adaptc.compile` on a base that is traced already."""
        base = {"base": self.base_of(name)} if FAMILIES[name].task else {}
        loaded = load({**base, "adapt": list(adapt), **spec})
        return Compiled(program_of(loaded, self.graph(name, dtype)))

    def initial(self, method: str, name: str) -> Compiled:
        """A compiled model with a method as initialised; shared, so not to be changed."""
        key = (method, name)
        if key not in self._compiled:
            for oldest in list(self._compiled)[: 1 - KEPT]:
                del self._compiled[oldest]
            self._compiled[key] = self.compiled(name, [entry(method, name)])
            _ = self._compiled[key].module
        return self._compiled[key]

    def adapted(self, method: str, name: str) -> Compiled:
        """The same with perturbed adapters: its own graph, and a module that shares no adapter with `initial`."""
        first = self.initial(method, name)
        program = copy.copy(first.program)
        program.graph = first.graph.copy()
        values = perturbed({n: first.graph.weights[n].load() for n in first.graph.adapter_names})
        program.graph.weights.update({n: Held(value) for n, value in values.items()})
        program.proofs, program.records = copy.copy(first.program.proofs), list(first.records)
        program.__dict__["module"] = module = copy.deepcopy(first.module)
        with torch.no_grad():
            for key, parameter in module.named_parameters():
                if key in values:
                    parameter.copy_(values[key])
                    program.graph.weights[key] = Held(parameter)
        return Compiled(program)
