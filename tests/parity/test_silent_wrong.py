"""What comes out wrong elsewhere without a word: right here, or refused. Each test shows the silence it is about."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import adaptc
from adaptc.compiler.compiled import Compiled
from adaptc.errors import AdaptcError, RefusedError
from tests.families import close, differs, perturb, randomise

peft = pytest.importorskip("peft")
WIDTH, WORDS = 16, 24


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.attn(x, x, x, need_weights=False)[0]


class Encoding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 24, batch_first=True)
        self.enc = nn.TransformerEncoder(layer, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.enc(x)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mid = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.mid(self.embed(x))))


class Replicated(nn.Module):
    """Three layers, the first and the last of which are one: one object, or one parameter in two objects."""

    def __init__(self, one_object: bool) -> None:
        super().__init__()
        first, middle = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        last = first if one_object else nn.Linear(WIDTH, WIDTH)
        last.weight, last.bias = first.weight, first.bias
        self.layers = nn.ModuleList([first, middle, last])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def theirs(model: nn.Module, *modules: str, autocast_adapter_dtype: bool = True, **options: Any) -> Any:
    """PEFT's LoRA on a copy, with random adapters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=[*modules], **options)
        made = peft.get_peft_model(
            copy.deepcopy(model), config, autocast_adapter_dtype=autocast_adapter_dtype
        )
    perturb(made)
    return made.eval()


def ours(model: nn.Module, x: torch.Tensor, *modules: str, **entry: Any) -> Compiled:
    """LoRA on the same modules, with random adapters."""
    made = adaptc.compile(
        {"adapt": [{"method": "lora", "target": [*modules], "r": 2, "alpha": 3, **entry}]},
        model=model,
        example_inputs=(x,),
        dynamic={"x": {0: "batch", 1: "seq"}},
    )
    perturb(made.module)
    return made


def read(model: nn.Module, x: torch.Tensor, path: Path, **entry: Any) -> Compiled:
    """The adapter that PEFT saved."""
    return adaptc.compile(
        {"adapt": [{"adapter": str(path), **entry}]},
        model=model,
        example_inputs=(x,),
        dynamic={"x": {0: "batch", 1: "seq"}},
    )


def noise(batch: int = 3, length: int = 5) -> torch.Tensor:
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(batch))


@pytest.fixture
def fast_path() -> Iterator[None]:
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(True)
    yield
    torch.backends.mha.set_fastpath_enabled(was)


def test_an_output_projection_alone() -> None:
    model, x = randomise(Attending()).eval(), noise()
    silent = theirs(model, "out_proj")
    with torch.no_grad():
        assert torch.equal(silent(x), model(x)), "PEFT: no effect"
    assert any(p.requires_grad for p in silent.parameters())
    assert not silent(x).requires_grad, "PEFT: no gradient"

    made = ours(model, x, "attn.out_proj")
    made.check_gradients()
    parameters = dict(made.module.named_parameters())
    A, B = (parameters[f"attn.out_proj.lora_{k}.default.weight"] for k in "AB")
    want = copy.deepcopy(model)
    want.attn.out_proj.weight.data += 1.5 * (B @ A).detach()
    with torch.no_grad():
        differs(want(x), model(x))
        close(made.module.eval()(x), want(x))
        close(made.fold()(x), want(x))


@pytest.mark.parametrize(
    "modules", [("linear1", "self_attn"), pytest.param(("linear1", "linear2"), marks=pytest.mark.slow)]
)
def test_the_fast_path_of_an_encoder(fast_path: None, modules: tuple[str, ...], tmp_path: Path) -> None:
    model, x = randomise(Encoding()).eval(), noise()
    silent = theirs(model, *modules)
    silent.save_pretrained(tmp_path)
    with torch.no_grad():
        close(silent(x), model(x), 64)  # PEFT: the adapter is passed over
        torch.backends.mha.set_fastpath_enabled(False)
        want = silent(x)
        torch.backends.mha.set_fastpath_enabled(True)
        differs(want, model(x))
        made = read(model, x, tmp_path)
        assert torch.backends.mha.get_fastpath_enabled(), "it is left as it was"
        close(made.module.eval()(x), want)
        close(made.fold()(x), want)
        close(made.module.train().eval()(x), want)
    made.check_gradients()


def test_tied_embeddings(tmp_path: Path) -> None:
    model = randomise(Tied()).eval()
    x = torch.randint(0, WORDS, (3, 5))
    x[0, 0] = WORDS - 1
    silent = theirs(model, "head")
    silent.save_pretrained(tmp_path)
    with torch.no_grad():
        want = silent(x)
        differs(silent.merge_and_unload()(x), want)  # PEFT: the embedding has changed too
    with pytest.raises(RefusedError) as refused:
        read(model, x, tmp_path).fold()
    for word in ("head", "embed", "on_alias: untie", "on_alias: live", "leave it out"):
        assert word in str(refused.value)
    for mode in ("untie", "live"):
        made = read(model, x, tmp_path, on_alias=mode)
        with torch.no_grad():
            close(made.module.eval()(x), want)
            close(made.fold()(x), want)


@pytest.mark.parametrize("one_object", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_layer_under_two_names(one_object: bool) -> None:
    model, x = randomise(Replicated(one_object)).eval(), noise()
    made = ours(model, x, "layers.0")
    with pytest.raises(RefusedError, match=r"layers\.0\.weight.*layers\.2"):
        made.fold()
    parameters = dict(made.module.named_parameters())
    A, B = (parameters[f"layers.0.lora_{k}.default.weight"].detach() for k in "AB")
    with torch.no_grad():
        want = torch.tanh(F.linear(x, model.layers[0].weight + 1.5 * B @ A, model.layers[0].bias))
        want = torch.tanh(model.layers[2](torch.tanh(model.layers[1](want))))
        close(made.module.eval()(x), want)
        differs(want, model(x))
        close(ours(model, x, "layers.0", on_alias="untie").fold()(x), want)


def test_a_checkpoint_of_replicated_layers(tmp_path: Path) -> None:
    model = randomise(Replicated(True)).eval()
    theirs(model, "layers.1").save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"layer_replication": [[0, 2], [1, 3]]}))
    with pytest.raises(AdaptcError, match="layer_replication"):
        adaptc.compile(
            {"adapt": [{"adapter": str(tmp_path)}]},
            model=model,
            example_inputs=(noise(),),
            dynamic={"x": {0: "b"}},
        )


@pytest.mark.slow
def test_replicated_layers_are_merged_wrong_by_peft() -> None:
    """Why the checkpoint above is refused: PEFT folds every copy's adapter into the one weight that they share."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    model = randomise(LlamaForCausalLM(config)).eval()
    silent = theirs(model, "q_proj", "down_proj", layer_replication=[[0, 2], [1, 2]])
    ids = torch.randint(0, WORDS, (2, 5))
    with torch.no_grad():
        want = silent(input_ids=ids).logits
        differs(silent.merge_and_unload()(input_ids=ids).logits, want)


class Narrow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(64, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x)


def test_bfloat16_is_rounded_once(tmp_path: Path) -> None:
    """The folded weight is the nearest to the exact one; in PEFT the product of the factors is rounded before the sum,
    and taking it out again does not give the base back."""
    model = randomise(Narrow()).to(torch.bfloat16).eval()
    base, x = model.lin.weight.detach().clone(), torch.randn(3, 5, 64, dtype=torch.bfloat16)
    silent = theirs(model, "lin", autocast_adapter_dtype=False)
    silent.save_pretrained(tmp_path)
    parameters = dict(silent.named_parameters())
    A, B = (parameters[f"base_model.model.lin.lora_{k}.default.weight"].detach().double() for k in "AB")
    exact = base.double() + 1.5 * B @ A
    folded = read(model, x, tmp_path).fold()
    with torch.no_grad():
        assert torch.equal(folded.get_parameter("lin.weight"), exact.to(torch.bfloat16))
        close(folded(x), (x.double() @ exact.to(torch.bfloat16).double().t()).to(torch.bfloat16), 4)
        assert torch.equal(model.lin.weight, base), "the user's model is left as it was"
        silent.merge_adapter()
        merged = silent.base_model.model.lin.base_layer.weight
        assert (merged.double() - exact).abs().mean() > 1.05 * (exact.to(torch.bfloat16) - exact).abs().mean()
        silent.unmerge_adapter()
        assert not torch.equal(silent.base_model.model.lin.base_layer.weight, base)


# s3: OFT on a convolution


class Convolving(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


@pytest.mark.parametrize("seed", [None, 3], ids=["at the start", "trained"])
def test_oft_on_a_3x3_convolution_runs_as_it_merges(seed: int | None, tmp_path: Path) -> None:
    """PEFT folds overlapping patches back on one another, so that its forward is not its own merge."""
    base = randomise(Convolving())
    config = peft.OFTConfig(target_modules=["conv"], oft_block_size=4)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    if seed is not None:
        perturb(theirs, seed)
    theirs.save_pretrained(tmp_path)
    x = torch.randn(2, 4, 7, 5)
    with torch.no_grad():
        live = theirs(x)
        merged = theirs.merge_and_unload()(x)
    differs(live, merged)  # the silence
    compiled = adaptc.compile(
        {"adapt": [{"adapter": str(tmp_path)}]},
        model=base,
        example_inputs=(torch.randn(3, 4, 9, 8),),
        dynamic={"x": {0: "batch", 2: "height", 3: "width"}},
    )
    with torch.no_grad():
        close(compiled.module.eval()(x), merged)
        close(compiled.fold()(x), merged)
        if seed is None:
            close(merged, base(x))
        else:
            differs(merged, base(x))


# AdaLoRA's penalty without a task


def test_adaloras_penalty_does_not_depend_on_how_it_is_called() -> None:
    """Without a task_type PEFT's forward goes past the model that adds it; here a training step adds it."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> Any:
            from transformers.modeling_outputs import SequenceClassifierOutput

            return SequenceClassifierOutput(loss=self.layer(x).square().mean())

    base, x = randomise(Model()), torch.randn(3, 8)
    config = peft.AdaLoraConfig(target_modules=["layer"], init_r=4, target_r=2, total_step=9)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    perturb(theirs)
    plain = theirs.base_model.model(x).loss
    assert torch.equal(theirs(x).loss, plain)  # the silence
    assert (theirs.base_model(x).loss - plain).item() > 0.1

    module = adaptc.compile(
        {"adapt": [{"method": "adalora", "target": "layer", "init_r": 4, "target_r": 2}]},
        model=Plain(base.layer),
        example_inputs=(x,),
    ).module
    with torch.no_grad():
        for key in "ABE":
            module.get_parameter(f"layer.lora_{key}.default").copy_(
                theirs.get_parameter(f"base_model.model.layer.lora_{key}.default")
            )
    close(adaptc.TrainingStep(module, steps=9).penalty(), theirs.base_model(x).loss - plain, 4096)


class Plain(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)
