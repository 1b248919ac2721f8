"""What holds for every quantization scheme: the bits, the graph, every method on top, every layer, every product."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import adaptc
from adaptc.compiler.compiled import Compiled
from adaptc.methods.method import METHODS
from adaptc.quantization.operators import quantized_embedding, quantized_linear, quantized_product
from adaptc.quantization.quantized_weight import bytes_of, weight_of
from adaptc.quantization.scheme import SCHEMES, Scheme, scheme_of
from tests.families import (
    FAMILIES,
    SHAPES,
    Zoo,
    close,
    differs,
    entry,
    inputs,
    marked,
    matrix,
    outputs,
    perturb,
    randomise,
    scheme_entry,
    small,
)
from tests.small_models import Words

PLAIN = tuple(name for name in SCHEMES if not SCHEMES[name].calibrated)


VARIANTS: dict[str, list[dict[str, Any]]] = {
    "symmetric": [{}, {"symmetric": True}, {"symmetric": False}],
    "clip": [{"clip": True}, {"block_size": None}],
    "double": [{"double": True}],
    "block_size": [{"block_size": 32}],
    "bits": [{"bits": 2}, {"bits": 8}],
    "act_order": [{"act_order": True}],
}


STAND_FOR_ALL = ("nf4", "int4")
"""The schemes that stand for all in the quick laws: one of each layout."""


SIZES = ((1, 16), (3, 40), (7, 64), (5, 33), (2, 1), (64, 48))


WEIGHT_METHODS = tuple(sorted(name for name, cls in METHODS.items() if issubclass(cls, adaptc.WeightMethod)))


def variants() -> list[Any]:
    """Every scheme with small options, and with each option that it has changed."""
    found = {}
    for _, cls in sorted(SCHEMES.items()):
        fields = {f.name for f in dataclasses.fields(cls)}
        changes = [{}, *(c for option, cs in VARIANTS.items() if option in fields for c in cs)]
        for change in changes:
            scheme = cls(**{**cls.small, **change})
            if scheme.refuses(4, 64) is None:
                found[scheme.text] = scheme
    return [pytest.param(scheme, id=text) for text, scheme in found.items()]


def stored(scheme: Scheme, W: torch.Tensor) -> dict[str, torch.Tensor]:
    given = matrix(50, W.shape[1], seed=7) if scheme.calibrated else None
    return {**scheme.quantize(W, given), **scheme.constants()}


# the bits


@pytest.mark.parametrize("scheme", variants())
@pytest.mark.parametrize("size", SIZES)
def test_what_is_stored_is_what_was_said(scheme: Scheme, size: tuple[int, int]) -> None:
    kept = scheme.quantize(matrix(*size), matrix(50, size[1], 7) if scheme.calibrated else None)
    said = scheme.stored(*size)
    assert {n: (tuple(t.shape), str(t.dtype)) for n, t in kept.items()} == {
        n: (k.shape, f"torch.{k.dtype}") for n, k in said.items()
    }
    assert bytes_of(scheme, *size) == sum(t.numel() * t.element_size() for t in kept.values())
    back = scheme.dequantize(*size, {**kept, **scheme.constants()})
    assert back.shape == size
    assert back.dtype == torch.float32
    assert scheme_of(scheme.text) == scheme


@pytest.mark.parametrize("scheme", variants())
@pytest.mark.parametrize("size", SIZES)
def test_the_fast_ways_give_the_same(scheme: Scheme, size: tuple[int, int]) -> None:
    held = stored(scheme, matrix(*size))
    back = scheme.dequantize(*size, held)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(scheme.unpack(*size, held, dtype), back.to(dtype))
    ids = torch.tensor([[0, size[0] - 1], [size[0] // 2, 0]])
    if "embedding" in scheme.kinds:
        assert torch.equal(scheme.lookup(*size, held, ids), back[ids])


@pytest.mark.parametrize("scheme", variants())
def test_more_bits_are_nearer(scheme: Scheme) -> None:
    W = matrix(64, 256)
    back = scheme.dequantize(64, 256, stored(scheme, W))
    allowed = {2: 0.7, 4: 0.2, 8: 0.02}[getattr(scheme, "bits", 4)]
    assert float((back - W).norm() / W.norm()) < allowed


@pytest.mark.parametrize("name", PLAIN)
def test_rounding_is_to_the_nearest(name: str) -> None:
    """No other code of a value's block is nearer; what is rounded stays as it is when rounded again."""
    scheme = SCHEMES[name](**SCHEMES[name].small)
    W = matrix(6, 48)
    held = stored(scheme, W)
    back = scheme.dequantize(6, 48, held)
    codes = held["codes"]
    for change in (1, 16) if codes.shape[0] != 6 else (1,):
        for direction in (1, -1):
            other = dict(held)
            other["codes"] = (codes.int() + direction * change).clamp(0, 255).to(torch.uint8)
            near = scheme.dequantize(6, 48, other)
            moved = near != back
            assert moved.any()
            assert ((near - W).abs() >= (back - W).abs() - 1e-6)[moved].float().mean() > 0.9


@pytest.mark.parametrize("name", SCHEMES)
def test_zeros_stay_zeros(name: str) -> None:
    scheme = SCHEMES[name](**SCHEMES[name].small)
    W = matrix(4, 64)
    W[1] = 0
    back = scheme.dequantize(4, 64, stored(scheme, W))
    assert torch.isfinite(back).all()
    assert not back[1].any()
    assert not scheme.dequantize(2, 32, stored(scheme, torch.zeros(2, 32))).any()


# the graph


def replaced(model: nn.Module, made: Compiled) -> nn.Module:
    """The eager model with what the bits stand for as its weights."""
    result = copy.deepcopy(model)
    with torch.no_grad():
        for name, q in made.graph.quantized.items():
            owner = result.get_submodule(name.rpartition(".")[0])
            W = getattr(owner, name.rpartition(".")[2])
            rest = q.quantization.rest() if q.rest else None
            W.copy_(weight_of(q.site, q.quantization.dequantized().to(W.dtype), rest))
    return result


def check(zoo: Zoo, family: str, made: Compiled, modules: Mapping[str, nn.Module], model: nn.Module) -> None:
    for number, (batch, length) in enumerate(SHAPES):
        tensors = inputs(family, batch, length, pad=number == 0, seed=number)
        want = zoo.run_eager(family, tensors, model)
        if number == 0:
            differs(want[FAMILIES[family].output], zoo.run_eager(family, tensors)[FAMILIES[family].output])
        for module in modules.values():
            with torch.no_grad():
                got = outputs(module.eval(), tensors, made.base.outputs)
            for name, value in want.items():
                close(got[name], value)


@pytest.mark.parametrize("name", marked(PLAIN, STAND_FOR_ALL))
@pytest.mark.parametrize("family", marked(FAMILIES, ("raw",)))
def test_a_quantized_graph_is_the_model_with_rounded_weights(zoo: Zoo, family: str, name: str) -> None:
    """Whatever reads them: linear layers, Conv1D, convolutions, products of one's own, embeddings and tied heads."""
    target = [*FAMILIES[family].target]
    if "embedding" in SCHEMES[name].kinds:
        target += ["*wte", "*word_embeddings", "*embed_tokens", "shared"]
    if not any(s.kind in SCHEMES[name].kinds for s in zoo.graph(family).sites):
        pytest.skip(f"{name} stands for {sorted(SCHEMES[name].kinds)}")
    if family == "resnet" and "conv" not in SCHEMES[name].kinds:
        target = ["classifier.1"]
    made = zoo.compiled(family, [], quantize=[{**scheme_entry(name), "target": target}])
    assert made.graph.quantized
    model = replaced(zoo.eager(family), made)
    check(zoo, family, made, {"live": made.module, "folded": made.fold()}, model)
    names = set(made.module.state_dict())
    assert not names & set(made.graph.quantized), "a weight is there in floats too"


@pytest.mark.parametrize(
    "target",
    [
        "*.c_attn[q,v]",
        pytest.param("*.c_attn[k]", marks=pytest.mark.slow),
        pytest.param("*.c_attn[0:20]", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", marked(PLAIN, STAND_FOR_ALL[:1]))
def test_slices_leave_the_other_rows_alone(zoo: Zoo, name: str, target: str) -> None:
    made = zoo.compiled("gpt2", [], quantize=[{**scheme_entry(name), "target": target}])
    model = replaced(zoo.eager("gpt2"), made)
    check(zoo, "gpt2", made, {"live": made.module, "folded": made.fold()}, model)
    q = next(iter(made.graph.quantized.values()))
    before, after = zoo.eager("gpt2").state_dict(), model.state_dict()
    name = next(iter(made.graph.quantized))
    changed = (before[name] != after[name]).any(0)
    kept = torch.zeros(before[name].shape[1], dtype=torch.bool)
    for start, stop in q.site.rows:
        kept[start:stop] = True
    assert not changed[~kept].any()
    assert changed[kept].all()


@pytest.mark.slow
@pytest.mark.parametrize("name", marked(PLAIN, STAND_FOR_ALL[:1]))
def test_experts(zoo: Zoo, name: str) -> None:
    if "experts" not in SCHEMES[name].kinds:
        pytest.skip(f"{name} stands for {sorted(SCHEMES[name].kinds)}")
    quantize = [{**scheme_entry(name), "target": "*.experts.*"}]
    made = zoo.compiled("mixtral", [], quantize=quantize)
    assert {q.site.kind for q in made.graph.quantized.values()} == {"experts"}
    check(zoo, "mixtral", made, {"live": made.module}, replaced(zoo.eager("mixtral"), made))


@pytest.mark.parametrize("method", marked(WEIGHT_METHODS, ("lora",)))
def test_every_method_sits_on_every_quantized_weight(zoo: Zoo, method: str) -> None:
    """W is whatever stands there: the same adapter on rounded floats computes and learns the same."""
    if METHODS[method](**small(method)).calibrated:  # type: ignore[call-arg]
        pytest.skip("chooses by data, which a module in memory is not given here")
    for family in ("block",) if method == "layernorm" else ("block", "raw"):
        target = entry(method, family)
        kinds = {s.kind for s in zoo.graph(family).sites} | {"parameter"}
        if not METHODS[method].kinds & kinds:
            continue
        quantize = [{**scheme_entry("nf4"), "target": list(FAMILIES[family].target)}]
        made = zoo.compiled(family, [target], quantize=quantize)
        perturb(made.module)
        floats = replaced(zoo.eager(family), made)
        plain = adaptc.compile(
            {"adapt": [target]},
            model=floats,
            example_inputs=inputs(family, 3, 11),
            dynamic={name: {0: "batch", 1: "seq"} for name in inputs(family)},
        )
        with torch.no_grad():
            own = dict(plain.module.named_parameters())
            for name, value in made.module.named_parameters():
                if value.requires_grad:
                    own[name].copy_(value)
        tensors = inputs(family)
        both = []
        for module in (made.module, plain.module):
            module.eval()
            got = outputs(module, tensors, plain.base.outputs)[FAMILIES[family].output]
            got.square().mean().backward()
            both.append(({n: p.grad for n, p in module.named_parameters() if p.grad is not None}, got))
        close(both[0][1], both[1][1])
        assert both[0][0].keys() == both[1][0].keys()
        for name, grad in both[1][0].items():
            close(both[0][0][name], grad, epsilons=4096)


CALIBRATED = [param for param in variants() if param.values[0].calibrated]


@pytest.mark.parametrize("scheme", CALIBRATED)
def test_integers_in_other_columns_or_scales_are_plain_ones(scheme: Any) -> None:
    """x M = x' M': what kernels of plain integers are given."""
    W, x = matrix(12, 40), matrix(7, 40, seed=3)
    held = stored(scheme, W)
    plain = scheme.without_inputs()
    inner = plain.dequantize(12, 40, {key: held[key] for key in plain.stored(12, 40)})
    want = F.linear(x, scheme.dequantize(12, 40, held))
    close(F.linear(scheme.transformed_inputs(x, held), inner), want)
    if set(held) != set(plain.stored(12, 40)):
        assert not torch.allclose(F.linear(x, inner), want, rtol=1e-3)


# products


@pytest.mark.parametrize("name", marked(SCHEMES, ("nf4", "int4", "dynamic-int8")))
@pytest.mark.parametrize("runtime", ["onnxruntime", pytest.param("standard", marks=pytest.mark.slow)])
def test_onnx(name: str, runtime: str, tmp_path: Path) -> None:
    """Proved by the compiler itself: to float arithmetic's error, and where activations are rounded, so."""
    model, x = Words().eval(), torch.randint(0, 30, (2, 5))
    randomise(model)
    target = [
        n for n in ("embed", "up", "down", "head") if n != "embed" or "embedding" in SCHEMES[name].kinds
    ]
    made = adaptc.compile(
        {"quantize": [{**scheme_entry(name), "target": target}]},
        model=model,
        example_inputs=(x,),
        dynamic={"x": {0: "batch", 1: "seq"}},
        calibration=[{"x": torch.randint(0, 20, (8, 5))}],
    )
    made.emit("onnx", tmp_path / "m.onnx", target_runtime=runtime)
    proofs = {p.name: p for p in made.proofs}
    assert proofs["onnx, folded"].relative < 2e-6
    if made.errors is not None and any("rounds activations" in name for name in proofs):
        weights_only, all_of_it = made.errors.outputs["output"], made.errors.rounded["output"]
        assert all_of_it != weights_only, "what rounded activations cost is told too"
    floats = sum(p.numel() for p in model.parameters()) * 4
    weights = (
        sum(8 * q.quantization.size[0] * q.quantization.size[1] for q in made.graph.quantized.values()) // 2
    )
    assert floats - weights > 0
    if runtime == "onnxruntime":
        made.emit("onnx", tmp_path / "float.onnx", round_activations=False)
        assert made.proofs[-1].name == "onnx, folded"
        assert made.proofs[-1].relative < 2e-6
    import onnx

    held = onnx.load(tmp_path / "m.onnx").graph.initializer
    assert not [i.name for i in held if i.name in made.graph.quantized], "the float weight is in the file too"


@pytest.mark.parametrize("name", marked(PLAIN, ()))
def test_a_torch_artifact_holds_the_bits(zoo: Zoo, name: str, tmp_path: Path) -> None:
    quantize = [{**scheme_entry(name), "target": "all-linear"}]
    made = zoo.compiled("llama", [{"method": "lora", "target": "all-linear", "r": 2}], quantize=quantize)
    perturb(made.module)
    made.emit("torch", tmp_path / "artifact")
    code = "import sys, adaptc; print(len(adaptc.load(sys.argv[1]).state_dict()))"
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "artifact")], capture_output=True, text=True
    )
    assert ran.stdout.strip() == str(len(made.module.state_dict())), ran.stderr
    again = adaptc.load(tmp_path / "artifact")
    tensors = inputs("llama")
    with torch.no_grad():
        got, want = (outputs(m.eval(), tensors, ["logits"])["logits"] for m in (again, made.module))
    close(got, want)
    state = again.state_dict()
    for q in made.graph.quantized.values():
        held = [state[name] for name in q.tensors.values() if name.startswith(q.site.parameter)]
        assert sum(t.numel() * t.element_size() for t in held) == bytes_of(q.scheme, *q.quantization.size)
        assert q.site.parameter not in state
    outputs(again.train(), tensors, ["logits"])["logits"].sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in again.parameters())


@pytest.mark.parametrize("name", SCHEMES)
def test_operations(name: str) -> None:
    """torch's own checks of custom operations: shapes, aliases, autograd, compilation."""
    scheme = SCHEMES[name](**SCHEMES[name].small)
    W = matrix(12, 40)
    held = list(stored(scheme, W).values())
    x, bias = matrix(3, 40, 3).requires_grad_(), matrix(1, 12, 4)[0].requires_grad_()
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(quantized_linear, (x, held, bias, scheme.text, 12, 40), test_utils=checks)
    torch.library.opcheck(quantized_product, (matrix(3, 12), held, scheme.text, 12, 40), test_utils=checks)
    back = scheme.dequantize(12, 40, stored(scheme, W))
    got = quantized_linear(x, held, bias, scheme.text, 12, 40)
    close(got, F.linear(x, back, bias))
    grads = torch.autograd.grad(got.square().sum(), (x, bias))
    for grad, want in zip(
        grads, torch.autograd.grad(F.linear(x, back, bias).square().sum(), (x, bias)), strict=True
    ):
        close(grad, want)
    if "embedding" in scheme.kinds:
        ids = torch.tensor([[1, 11]])
        args = (ids, held, scheme.text, 12, 40, torch.float32)
        torch.library.opcheck(quantized_embedding, args, test_utils=checks)
        assert torch.equal(quantized_embedding(*args), back[ids])


@pytest.mark.parametrize("name", [n for n in SCHEMES if SCHEMES[n].calibrated])
def test_inputs_make_it_better_than_rounding(name: str) -> None:
    """On inputs of the same kind that it has not seen, as real layers have them: a few channels are large."""
    scheme = SCHEMES[name](block_size=64)
    generator = torch.Generator().manual_seed(3)
    mix = (
        torch.randn(16, 64, generator=generator)
        * torch.logspace(-1.5, 1.5, 64)[torch.randperm(64, generator=generator)]
    )
    seen, unseen = (
        torch.randn(512, 16, generator=generator) @ mix + 0.1 * torch.randn(512, 64, generator=generator)
        for _ in range(2)
    )
    W, plain = matrix(48, 64), scheme.without_inputs()
    errors = {}
    for which, given in ((scheme, seen), (plain, None)):
        held = {**which.quantize(W, given), **which.constants()}
        errors[which is scheme] = float((unseen @ (which.dequantize(48, 64, held) - W).t()).norm())
    assert errors[True] < 0.8 * errors[False]
