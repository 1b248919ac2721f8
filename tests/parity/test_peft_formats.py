"""PEFT on what is no linear layer: its checkpoints give its outputs here, and what is written here gives ours there."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import adaptc
from adaptc.compiler.compiled import Compiled
from adaptc.emit.onnx.runtime import onnx_runner
from tests.families import Zoo, close, differs, inputs, perturb, randomise

peft = pytest.importorskip("peft")

WORDS, WIDTH = 24, 16


class Convolutions(nn.Module):
    def __init__(self, dimensions: int) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
        self.c, self.d = conv(4, 12, 3, padding=1, stride=2), conv(12, 16, 1, bias=False)
        self.lin = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.d(torch.relu(self.c(x))))
        return self.lin(x.flatten(2).mean(-1))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.lin = nn.Embedding(WORDS, WIDTH, padding_idx=3), nn.Linear(WIDTH, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(torch.tanh(self.emb(x)))


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.lin = nn.Linear(WIDTH, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x + self.attn(x, x, x, need_weights=False)[0])


class Encoding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 4, 24, batch_first=True), 2)
        self.lin = nn.Linear(WIDTH, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(self.enc(x))


class Parameters(nn.Module):
    """Weights without a layer, in two orientations, one of them three matrices; they stand below the root."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.W, self.V = nn.Parameter(torch.empty(WIDTH, 12)), nn.Parameter(torch.empty(WIDTH, 12))
            self.E = nn.Parameter(torch.empty(3, 10, WIDTH))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.tanh(torch.einsum("bsi,oi->bso", torch.tanh(x @ self.W), self.V))
            return torch.einsum("bsi,eoi->bseo", x, self.E).sum(2)

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.lin = self.Inner(), nn.Linear(10, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(self.inner(x))


class Matrices(nn.Module):
    """Weights that are called `weight`: of layers of torch, and of a layer that holds its own (in, out)."""

    class Times(nn.Module):
        def __init__(self, inner: int, out: int) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.empty(inner, out)), nn.Parameter(torch.empty(out))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight + self.bias

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.first = nn.Embedding(30, WIDTH), self.Times(WIDTH, 12)
        self.second, self.lin = self.Times(12, 12), nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(torch.tanh(self.second(torch.tanh(self.first(self.emb(x))))))


class Experts(nn.Module):
    """Four matrices in one parameter, as transformers fuses them; `is_transposed` is its own word for (in, out)."""

    class Inner(nn.Module):
        def __init__(self, turned: bool) -> None:
            super().__init__()
            self.is_transposed = turned
            self.E = nn.Parameter(torch.empty((4, 4, 12) if turned else (4, 12, 4)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            flat = x.reshape(-1, 4, 4).transpose(0, 1)
            return torch.bmm(flat, self.E if self.is_transposed else self.E.transpose(1, 2)).sum(0)

    def __init__(self, turned: bool) -> None:
        super().__init__()
        self.inner, self.lin = self.Inner(turned), nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(self.inner(x)).reshape(*x.shape[:2], -1)


class Layers(nn.Module):
    """Numbered layers, below modules that are numbered too."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.side = nn.Conv1d(WIDTH, WIDTH, 3, padding=1), nn.Conv1d(WIDTH, WIDTH, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.side(torch.tanh(self.conv(x)))

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"layers": nn.ModuleList(self.Block() for _ in range(3))})
        self.lin = nn.Linear(WIDTH, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.transpose(1, 2)
        for layer in self.body["layers"]:  # type: ignore[union-attr]
            x = x + torch.tanh(layer(x))
        return self.lin(x.transpose(1, 2))


class Sided(nn.Module):
    """GPT-2's Conv1D beside a Linear."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.first, self.second, self.lin = Conv1D(12, WIDTH), Conv1D(WIDTH, 12), nn.Linear(WIDTH, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(torch.tanh(self.second(torch.tanh(self.first(x)))))


def noise(*shape: int) -> Callable[[int, int], torch.Tensor]:
    """Random inputs of (batch, length, *shape)."""
    return lambda batch, length: torch.randn(batch, length, *shape)


def image(dimensions: int) -> Callable[[int, int], torch.Tensor]:
    return lambda batch, length: torch.randn(batch, 4, *[length] * dimensions)


def words(batch: int, length: int) -> torch.Tensor:
    ids = torch.randint(0, WORDS, (batch, length))
    ids[0, 0] = WORDS - 1
    return ids


@dataclass(frozen=True)
class Base:
    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], torch.Tensor] = field(default_factory=lambda: noise(WIDTH))
    dynamic: Mapping[int, str] = field(default_factory=lambda: {0: "batch", 1: "seq"})


BASES = {
    **{f"conv{n}d": Base(lambda n=n: Convolutions(n), image(n), {0: "batch"}) for n in (1, 2, 3)},
    "words": Base(Words, words),
    "attending": Base(Attending),
    "encoding": Base(Encoding),
    "parameters": Base(Parameters),
    "matrices": Base(Matrices, inputs=words),
    "experts": Base(lambda: Experts(False)),
    "experts-turned": Base(lambda: Experts(True)),
    "layers": Base(Layers),
    "sided": Base(Sided),
}


def lora(*modules: str, **options: Any) -> Any:
    return lambda: peft.LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": [*modules], **options})


def ia3(*modules: str, **options: Any) -> Any:
    return lambda: peft.IA3Config(target_modules=[*modules], **options)


CONVOLUTIONS = {
    f"{name}-conv{n}d": (f"conv{n}d", lora("c", "d", "lin", **options))
    for n in (1, 2, 3)
    for name, options in {
        "lora": {},
        "dora": {"use_dora": True},
        "lora-bias": {"lora_bias": True, "target_modules": ["c", "lin"]},
        "bias-lora-only": {"bias": "lora_only", "target_modules": ["c"]},
        "bias-all": {"bias": "all", "target_modules": ["c", "d"]},
        "patterns": {"use_rslora": True, "rank_pattern": {"c": 3}, "alpha_pattern": {"d": 5, "lin": 7}},
    }.items()
}
CASES = {
    **CONVOLUTIONS,
    **{f"ia3-conv{n}d": (f"conv{n}d", ia3("c", "d", "lin", feedforward_modules=["d"])) for n in (2, 3)},
    "lora-words": ("words", lora("emb", "lin")),
    "dora-words": ("words", lora("emb", use_dora=True)),
    "patterns-words": ("words", lora("emb", "lin", rank_pattern={"emb": 3}, alpha_pattern={"^emb": 5})),
    "lora-attending": ("attending", lora("attn", "lin")),
    "bias-lora-only-attending": ("attending", lora("attn", bias="lora_only")),
    "bias-all-attending": ("attending", lora("attn", "lin", bias="all")),
    "patterns-attending": ("attending", lora("attn", "lin", rank_pattern={"attn": 3}, alpha_pattern={"attn": 5})),
    "lora-encoding": ("encoding", lora("linear1", "linear2", "self_attn")),
    "one-layer-encoding": ("encoding", lora("linear2", "self_attn", layers_to_transform=[1])),
    "no-layer-encoding": ("encoding", lora("self_attn", exclude_modules=["layers.0.self_attn"])),
    "lora-parameters": (
        "parameters", lora("lin", target_parameters=["inner.V", "inner.W", "inner.E"]),
    ),
    "patterns-parameters": (
        "parameters",
        lora(
            "lin", target_parameters=["inner.E", "inner.W"], rank_pattern={"inner": 3, "E": 4}, alpha_pattern={"W": 5}
        ),
    ),
    "matrices-in-out": (
        "matrices", lora(target_parameters=["first.weight", "second.weight"], rank_pattern={"first.weight": 3}),
    ),
    "matrices-of-layers": ("matrices", lora(target_parameters=["emb.weight", "lin.weight", "second.weight"])),
    "matrices-beside-layers": ("matrices", lora("lin", "emb", target_parameters=["first.weight"])),
    "lora-experts": ("experts", lora("lin", target_parameters=["inner.E"])),
    "lora-experts-turned": ("experts-turned", lora("lin", target_parameters=["inner.E"])),
    "layers-to-transform": ("layers", lora("conv", layers_to_transform=[0, 2])),
    "one-layer-as-a-number": ("layers", lora("conv", "side", layers_to_transform=1, layers_pattern="layers")),
    "excluded": ("layers", lora("conv", "lin", exclude_modules=["layers.1.conv"])),
    "excluded-by-regex": ("layers", lora("conv", "side", exclude_modules=r".*\.[12]\..*")),
    "saved-modules": ("layers", lora("conv", modules_to_save=["layers.2.side", "lin"])),
    "saved-by-the-end-of-a-name": ("layers", lora("conv", modules_to_save=["ide"])),
    "saved-words": ("words", lora("lin", modules_to_save=["emb"])),
    "fan-in-fan-out": ("sided", lora("first", "second", fan_in_fan_out=True)),
    "fan-in-fan-out-ia3": (
        "sided", ia3("first", "second", "lin", feedforward_modules=["second"], fan_in_fan_out=True),
    ),
    "regex-attending": ("attending", lora(target_modules="attn|lin")),
    "regex-of-both": ("sided", lora(target_modules=r"(first|lin)")),
}  # fmt: skip
QUICK = {
    *("lora-conv1d", "lora-conv3d", "dora-conv2d", "lora-bias-conv1d", "bias-lora-only-conv2d", "ia3-conv2d"),
    *("matrices-in-out", "matrices-of-layers"),
    *("dora-words", "patterns-attending", "bias-all-attending", "patterns-parameters", "lora-experts"),
    *(
        "lora-experts-turned",
        "layers-to-transform",
        "excluded-by-regex",
        "saved-modules",
        "saved-by-the-end-of-a-name",
        "fan-in-fan-out-ia3",
    ),
}


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=[pytest.mark.slow])


EVERY = [name if name in QUICK else slow(name) for name in CASES]


@dataclass
class Pair:
    """One adapter, in PEFT and in adaptc."""

    base: Base
    model: nn.Module
    theirs: nn.Module
    directory: Path
    ours: Compiled

    def example(self, batch: int, length: int) -> torch.Tensor:
        torch.manual_seed(100 * batch + length)
        return self.base.inputs(batch, length)


def quiet(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **kwargs)


def compiled(base: Base, model: nn.Module, directory: Path, **entry: Any) -> Compiled:
    torch.manual_seed(0)
    return adaptc.compile(
        {"adapt": [{"adapter": str(directory), **entry}]},
        model=model,
        example_inputs=(base.inputs(3, 5),),
        dynamic={"x": base.dynamic},
    )


@pytest.fixture(scope="module", autouse=True)
def _no_fast_path() -> Iterator[None]:
    """PEFT's adapters inside `nn.TransformerEncoder` are passed over on it; see test_silent_wrong."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    made: dict[str, Pair] = {}

    def pair(case: str) -> Pair:
        if case not in made:
            name, config = CASES[case]
            base, directory = BASES[name], tmp_path_factory.mktemp(case)
            torch.manual_seed(0)
            model = randomise(base.build()).eval()
            theirs = quiet(peft.get_peft_model, copy.deepcopy(model), config())
            perturb(theirs)
            quiet(theirs.save_pretrained, directory)
            made[case] = Pair(base, model, theirs.eval(), directory, compiled(base, model, directory))
        return made[case]

    return pair


@pytest.mark.parametrize("case", EVERY)
def test_a_checkpoint_of_peft_gives_pefts_outputs(pairs: Callable[[str], Pair], case: str) -> None:
    pair = pairs(case)
    module, folded = pair.ours.module.eval(), pair.ours.fold()
    for batch, length in ((2, 7 if 1 in pair.base.dynamic else 5), (1, 1 if 1 in pair.base.dynamic else 5)):
        x = pair.example(batch, length)
        with torch.no_grad():
            want = pair.theirs(x)
            close(module(x), want)
            close(folded(x), want)
            differs(want, pair.model(x))


@pytest.mark.parametrize("case", EVERY)
def test_what_is_saved_gives_our_outputs_in_peft(
    pairs: Callable[[str], Pair], case: str, tmp_path: Path
) -> None:
    pair = pairs(case)
    perturb(pair.ours.module, seed=7)  # trained further
    pair.ours.save_adapter(tmp_path)
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (tmp_path, pair.directory))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        twin = peft.PeftModel.from_pretrained(copy.deepcopy(pair.model), tmp_path).eval()
    assert not [w for w in caught if "missing" in str(w.message).lower()]
    x = pair.example(2, 5)
    with torch.no_grad():
        close(twin(x), pair.ours.module.eval()(x))
        differs(twin(x), pair.theirs(x))
    written, known = (json.loads((d / "adapter_config.json").read_text()) for d in (tmp_path, pair.directory))
    for key in ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "lora_bias", "bias"):
        assert (written.get(key) or None) == (known.get(key) or None), key
    pair.ours.load_adapter(pair.directory)  # and back
    with torch.no_grad():
        close(pair.ours.module.eval()(x), pair.theirs(x))


@pytest.mark.parametrize(
    "case", ["lora-experts-turned", *(slow(name) for name in ("lora-conv3d", "dora-words", "lora-encoding"))]
)
def test_the_program_of_a_checkpoint_gives_pefts_outputs(
    pairs: Callable[[str], Pair], case: str, tmp_path: Path
) -> None:
    pair = pairs(case)
    pair.ours.emit("onnx", tmp_path / "m.onnx")
    program, x = onnx_runner(tmp_path / "m.onnx"), pair.example(2, 5)
    with torch.no_grad():
        close(program({"x": x})[0], pair.theirs(x))


def test_peft_adds_twice_to_the_output_of_attention(pairs: Callable[[str], Pair]) -> None:
    """PEFT 0.21 does; its outputs are what its checkpoints stand for, so they are ours too."""
    pair, x = pairs("lora-attending"), torch.randn(2, 5, WIDTH)
    keys = load_file(pair.directory / "adapter_model.safetensors")
    once, twice = copy.deepcopy(pair.model), copy.deepcopy(pair.model)
    for model, factor in ((once, 1), (twice, 2)):
        for module, weight, key, times in (
            (model.attn, "in_proj_weight", "attn", 1),
            (model.attn.out_proj, "weight", "attn.base_layer.out_proj", factor),
            (model.lin, "weight", "lin", 1),
        ):
            A, B = (keys[f"base_model.model.{key}.lora_{k}.weight"] for k in "AB")
            getattr(module, weight).data += times * 1.5 * B @ A
    with torch.no_grad():
        close(pair.theirs(x), twice(x))
        close(pair.ours.module.eval()(x), twice(x))
        close(pair.ours.fold()(x), twice(x))
        differs(pair.theirs(x), once(x))


def test_gradients_of_an_embedding_are_pefts(pairs: Callable[[str], Pair]) -> None:
    """The padding word's own column learns nothing, and what it adds to the other factor is what it adds in PEFT."""
    pair = pairs("lora-words")
    x = pair.example(3, 6)
    x[0, 1] = x[2, 3] = 3
    found = []
    for module in (pair.theirs, pair.ours.module.eval()):
        module.zero_grad()
        y = module(x)
        (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
        found.append(
            {
                n.removeprefix("base_model.model."): p.grad
                for n, p in module.named_parameters()
                if p.requires_grad
            }
        )
    theirs, ours = found
    assert set(ours) == set(theirs)
    for key, gradient in theirs.items():
        close(ours[key], gradient)
    assert not ours["emb.lora_embedding_A.default"][:, 3].any()


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=WORDS, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=32,
    )  # fmt: skip
    model = randomise(transformers.MixtralForCausalLM(config)).eval()
    for name, parameter in model.named_parameters():
        if "experts" in name:
            parameter.data *= 10  # so that what they do is seen
    directory = tmp_path_factory.mktemp("mixtral")
    model.save_pretrained(directory)
    return model, directory


@pytest.mark.slow
@pytest.mark.parametrize("parameters", [("down_proj", "gate_up_proj"), slow(("gate_up_proj",))])
def test_experts_of_mixtral(mixtral: Any, parameters: tuple[str, ...], tmp_path: Path) -> None:
    """Fused experts, multiplied in groups, through `target_parameters`, beside layers of the attention."""
    model, directory = mixtral
    config = lora("q_proj", target_parameters=[f"mlp.experts.{name}" for name in parameters])()
    theirs = quiet(peft.get_peft_model, copy.deepcopy(model), config)
    perturb(theirs)
    quiet(theirs.eval().save_pretrained, tmp_path / "theirs")
    made = adaptc.compile(
        {
            "base": {"model": str(directory), "task": "causal-lm"},
            "adapt": [{"adapter": str(tmp_path / "theirs")}],
        }
    )
    assert {a.site.kind for a in made.graph.adaptations} == {"linear", "experts"}
    made.save_adapter(tmp_path / "ours")
    twin = quiet(peft.PeftModel.from_pretrained, copy.deepcopy(model), tmp_path / "ours").eval()
    module, folded = made.module.eval(), made.fold()
    for batch, length in ((2, 5), (1, 1), (3, 8)):
        tensors = {
            "input_ids": words(batch, length),
            "attention_mask": torch.ones(batch, length, dtype=torch.int64),
        }
        with torch.no_grad():
            want = theirs(**tensors, use_cache=False).logits
            close(module(**tensors)["logits"], want)
            close(folded(**tensors)["logits"], want)
            close(twin(**tensors, use_cache=False).logits, want)
    differs(want, model(**tensors, use_cache=False).logits)


@pytest.mark.slow
def test_embeddings_that_peft_saves_along(zoo: Zoo, tmp_path: Path) -> None:
    """A targeted `embed_tokens` stands in the file whole too, and another module's whole weight beside it."""
    config = lora("embed_tokens", "q_proj", modules_to_save=["lm_head"])()
    theirs = quiet(peft.get_peft_model, zoo.fresh("llama"), config)
    perturb(theirs)
    quiet(theirs.eval().save_pretrained, tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.model.embed_tokens.base_layer.weight" in held
    made = zoo.compiled("llama", [{"adapter": str(tmp_path)}])
    tensors = inputs("llama", 2, 5)
    with torch.no_grad():
        want = theirs(**tensors, use_cache=False).logits
        close(made.module.eval()(**tensors)["logits"], want)
        close(made.fold()(**tensors)["logits"], want)
    made.save_adapter(tmp_path / "ours")
    twin = quiet(peft.PeftModel.from_pretrained, zoo.fresh("llama"), tmp_path / "ours").eval()
    with torch.no_grad():
        close(twin(**tensors, use_cache=False).logits, want)
