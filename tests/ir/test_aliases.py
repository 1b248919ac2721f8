"""One tensor in several places: refused, untied or kept live, as the spec says, and always what was asked for."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import adaptc
from adaptc.compiler.compiled import Compiled
from adaptc.emit.onnx.runtime import onnx_runner
from adaptc.errors import RefusedError
from tests.families import close, differs, perturb, randomise
from tests.small_models import LORA, Calls, near
from tests.small_models import compiled as adapted

WORDS, WIDTH = 24, 16


WAYS_OUT = ("on_alias: untie", "on_alias: live", "leave it out")


class Tied(nn.Module):
    """An embedding and a head that are one tensor; `backwards`: the head has the first name."""

    def __init__(self, backwards: bool = False) -> None:
        super().__init__()
        made = {"embed": nn.Embedding(WORDS, WIDTH), "head": nn.Linear(WIDTH, WORDS, bias=False)}
        for name in sorted(made, reverse=backwards):
            self.add_module(name, made[name])
        self.mid, self.drop = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(torch.tanh(self.mid(self.embed(x)))))


class Functional(nn.Module):
    """The head is no layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mid = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(torch.tanh(self.mid(self.embed(x))), self.embed.weight)


class Three(nn.Module):
    """Three layers that are one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in "abc")
        self.b.weight = self.c.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


class Pair(nn.Module):
    """Two layers that share weight and bias."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.b.weight, self.b.bias = self.a.weight, self.a.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x)))


class Twice(nn.Module):
    """One layer that runs twice, and so has one name."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(torch.tanh(self.a(x)))


def example(model: nn.Module, batch: int = 3, length: int = 5, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if hasattr(model, "embed"):
        ids = torch.randint(0, WORDS, (batch, length), generator=generator)
        ids[0, 0] = WORDS - 1
        return ids
    return torch.randn(batch, length, WIDTH, generator=generator)


def compiled(model: nn.Module, *adapt: Mapping[str, Any]) -> Compiled:
    """LoRA on each target unless it says otherwise, with random adapters."""
    entries = [{"method": "lora", **({"r": 2, "alpha": 3} if "method" not in a else {}), **a} for a in adapt]
    made = adaptc.compile(
        {"adapt": entries},
        model=randomise(model).eval(),
        example_inputs=(example(model),),
        dynamic={"x": {0: "batch", 1: "seq"}},
    )
    perturb(made.module)
    return made


def apart(model: nn.Module, made: Compiled, *modules: str) -> nn.Module:
    """What the person asked for: these layers with a weight of their own and LoRA in it; the others as they were."""
    state, result = dict(made.module.named_parameters()), copy.deepcopy(model)
    for name in modules:
        layer = result.get_submodule(name)
        W = layer.weight.detach().clone()
        if isinstance(layer, nn.Embedding):
            A, B = (state[f"{name}.lora_embedding_{k}.default"].detach() for k in "AB")
            layer.weight = nn.Parameter(W + 1.5 * (B @ A).t())
        else:
            A, B = (state[f"{name}.lora_{k}.default.weight"].detach() for k in "AB")
            layer.weight = nn.Parameter(W + 1.5 * B @ A)
    return result


def check(made: Compiled, want: nn.Module, base: nn.Module, onnx: Path | None = None) -> None:
    """Trainable, folded and (with a path) ONNX compute what is wanted, which is not what the base computes."""
    runners = [made.module.eval(), made.fold()]
    if onnx is not None:
        made.emit("onnx", onnx / "m.onnx")
        program = onnx_runner(onnx / "m.onnx")
        runners.append(lambda x: program({"x": x})[0])
    for batch, length in ((3, 5), (1, 1), (2, 4)):
        x = example(base, batch, length, seed=batch)
        with torch.no_grad():
            expected = want(x)
            for run in runners:
                close(run(x), expected)
            differs(expected, base(x))


TARGETS = {
    "head": [{"target": "head"}],
    "embed": [{"target": "embed"}],
    "both": [{"target": ["head", "embed"]}],
    "both-by-two-entries": [{"target": "head"}, {"target": "embed", "name": "other"}],
}


def of(adapt: list[dict[str, Any]]) -> list[str]:
    return [name for a in adapt for name in ([a["target"]] if isinstance(a["target"], str) else a["target"])]


@pytest.mark.parametrize(
    ("case", "backwards"),
    [*((case, False) for case in TARGETS), ("both", True), ("both-by-two-entries", True)],
)
def test_untied(case: str, backwards: bool, tmp_path: Path) -> None:
    model, adapt = Tied(backwards), [{**a, "on_alias": "untie", "name": "default"} for a in TARGETS[case]]
    made = compiled(model, *adapt)
    assert any("untied" in note for note in made.plan.notes)
    check(made, apart(model, made, *of(adapt)), model, tmp_path if case == "both" else None)
    folded = made.folded_graph()
    assert folded.operations == made.base.operations
    state = made.fold().state_dict()
    assert list(state) == list(model.state_dict())
    assert not torch.equal(state["head.weight"], state["embed.weight"])
    for name in {"head", "embed"} - set(of(adapt)):
        assert torch.equal(state[f"{name}.weight"], model.get_submodule(name).weight)


@pytest.mark.parametrize("case", TARGETS)
def test_kept_live(case: str, tmp_path: Path) -> None:
    model, adapt = Tied(), [{**a, "on_alias": "live", "name": "default"} for a in TARGETS[case]]
    made = compiled(model, *adapt, {"target": "mid"})
    assert any("kept live" in note for note in made.plan.notes)
    check(made, apart(model, made, *of(adapt), "mid"), model, tmp_path if case == "both" else None)
    folded = made.fold()
    left = {n.split(".")[0] for n, _ in folded.named_parameters() if "lora" in n}
    assert left == set(of(adapt)), "the layer without an alias is folded, the others are live"
    assert torch.equal(folded.get_parameter("embed.weight"), model.embed.weight)
    assert folded.get_parameter("embed.weight") is folded.get_parameter("head.weight")


@pytest.mark.parametrize("case", TARGETS)
def test_refused_unless_told_otherwise(case: str) -> None:
    model, adapt = Tied(), [{**a, "name": "default"} for a in TARGETS[case]]
    made = compiled(model, *adapt)
    note = next(note for note in made.plan.notes if "cannot be folded" in note)
    with pytest.raises(RefusedError) as refused:
        made.fold()
    for words in (note, str(refused.value)):
        assert "embed" in words
        assert "head" in words
        assert all(way in words for way in WAYS_OUT), words
    want, x = apart(model, made, *of(adapt)), example(model, 2, 4)
    with torch.no_grad():
        close(made.module.eval()(x), want(x))


def test_a_refusal_is_of_the_folded_program_only(tmp_path: Path) -> None:
    model = Tied()
    made, x = compiled(model, {"target": "head"}), example(model, 2, 4)
    with pytest.raises(RefusedError, match="on_alias: untie"):
        made.emit("onnx", tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()
    made.emit("onnx", tmp_path / "m.onnx", adapters="live")
    with torch.no_grad():
        close(onnx_runner(tmp_path / "m.onnx")({"x": x})[0], apart(model, made, "head")(x))


@pytest.mark.parametrize("mode", ["refuse", "untie", "live"])
def test_the_module_trains_in_both_modes_and_its_adapter_comes_back(mode: str, tmp_path: Path) -> None:
    model = Tied()
    made = compiled(model, {"target": ["head", "embed"], "on_alias": mode})
    module, x = made.module.train(), example(model, 4, 6)
    torch.manual_seed(1)
    noisy = module(x)
    differs(noisy, module.eval()(x))  # the model's own dropout
    module.train()
    (noisy * torch.randn(noisy.shape)).sum().backward()
    for name, parameter in module.named_parameters():
        assert (parameter.grad is not None) == ("lora" in name), name
    made.check_gradients()
    made.save_adapter(tmp_path)
    again = adaptc.compile(
        {"adapt": [{"adapter": str(tmp_path), "on_alias": mode}]},
        model=model,
        example_inputs=(x,),
        dynamic={"x": {0: "batch", 1: "seq"}},
    )
    with torch.no_grad():
        assert torch.equal(again.module.eval()(x), module.eval()(x))
    if mode != "refuse":
        with torch.no_grad():
            close(again.fold()(x), apart(model, made, "head", "embed")(x))


def test_modes_are_each_entrys_own() -> None:
    model = Three()
    adapt = [{"target": "a", "on_alias": "untie"}, {"target": "c", "on_alias": "live"}]
    made = compiled(model, *adapt)
    check(made, apart(model, made, "a", "c"), model)
    assert torch.equal(made.fold().get_parameter("b.weight"), model.b.weight)


@pytest.mark.parametrize(
    ("target", "mode"),
    [*((t, "untie") for t in ("abc", "ab", "bc", "ac", "b")), ("abc", "live"), ("b", "live")],
)
def test_three_users_of_one_tensor(target: str, mode: str) -> None:
    model = Three()
    made = compiled(model, {"target": list(target), "on_alias": mode})
    want, x = apart(model, made, *target), example(model)
    with torch.no_grad():
        close(made.module.eval()(x), want(x))
        close(made.fold()(x), want(x))
    for name in set("abc") - set(target):
        assert torch.equal(made.fold().get_submodule(name).weight, model.a.weight)


@pytest.mark.parametrize("mode", ["untie", "live"])
@pytest.mark.parametrize("method", ["ia3", "full"])
def test_a_shared_bias_goes_with_its_weight(method: str, mode: str) -> None:
    model = Pair()
    made = compiled(model, {"method": method, "target": "b", "on_alias": mode})
    state, want, _x = dict(made.module.named_parameters()), copy.deepcopy(model), example(model)
    want.b = nn.Linear(WIDTH, WIDTH)
    if method == "ia3":
        scale = state["b.ia3_l.default"].detach()
        W, b = model.b.weight * scale, model.b.bias * scale[:, 0]
    else:
        W, b = (state[f"b.full.default.{leaf}"] for leaf in ("weight", "bias"))
    want.b.weight, want.b.bias = nn.Parameter(W.detach()), nn.Parameter(b.detach())
    check(made, want, model)


@pytest.mark.parametrize("mode", ["untie", "live"])
def test_a_tie_in_the_forward_alone(mode: str) -> None:
    model = Functional()
    made = compiled(model, {"target": "embed", "on_alias": mode})
    state, x = dict(made.module.named_parameters()), example(model)
    A, B = (state[f"embed.lora_embedding_{k}.default"].detach() for k in "AB")
    looked = F.embedding(x, model.embed.weight + 1.5 * (B @ A).t())
    with torch.no_grad():
        want = F.linear(torch.tanh(model.mid(looked)), model.embed.weight)
        close(made.module.eval()(x), want)
        close(made.fold()(x), want)


def test_a_layer_that_runs_twice_is_no_alias() -> None:
    model = Twice()
    made = compiled(model, {"target": "a"})
    assert not made.plan.notes
    check(made, apart(model, made, "a"), model)
    assert made.folded_graph().operations == made.base.operations


SHARED = {
    "both-names": (Pair, ["a", "b"], ["a"]),
    "three-names": (Three, ["b", "c", "a"], ["a"]),
    "slices": (Twice, ["a[0:6]", "a[6:16]"], ["a[0:6]", "a[6:16]"]),
    "slices-of-both": (Pair, ["a[0:6]", "b[0:6]", "b[6:16]"], ["a[0:6]", "b[6:16]"]),
}


@pytest.mark.parametrize("case", SHARED)
def test_shared_is_adapted_once_by_each_entry(case: str) -> None:
    kind, target, adapted = SHARED[case]
    model = kind()
    made = compiled(model, {"target": target, "on_alias": "share"})
    assert [a.site.pattern for a in made.graph.adaptations] == adapted
    want, state = copy.deepcopy(model), made.fold().state_dict()
    assert list(state) == list(model.state_dict())
    with torch.no_grad():
        want.a.weight.copy_(state["a.weight"])
        assert (want.a.weight - model.a.weight).abs().amin(1).min() > 0, "every row has changed"
        for name in state:
            assert not name.endswith("weight") or torch.equal(state[name], state["a.weight"])
    check(made, want, model)


def parameter_of(module: nn.Module, name: str) -> torch.Tensor:
    return dict(module.named_parameters())[name]


def test_untie_takes_the_tensor_that_is_meant_out_of_several_in_one_operation() -> None:
    def stacked(m: Any, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, torch.cat([m.a.weight, m.b.weight])).tanh()

    model, x = Calls(stacked, a=nn.Linear(6, 4), b=nn.Linear(6, 4)), torch.randn(3, 6)
    made = adapted(
        model, [{"method": "full", "target": "b", "parameters": ["weight"], "on_alias": "untie"}], x
    )
    perturb(made.module)
    weight = torch.cat([model.get_parameter("a.weight"), parameter_of(made.module, "b.full.default.weight")])
    assert near(made.module.eval()(x), F.linear(x, weight).tanh())
    assert near(made.fold()(x), F.linear(x, weight).tanh())


def test_a_tensor_that_two_methods_change_in_different_places_is_refused() -> None:
    def tied(m: Any, x: torch.Tensor) -> torch.Tensor:
        return F.linear(m.e(x).mean(1), m.e.weight)

    model, x = Calls(tied, e=nn.Embedding(9, 6)), torch.randint(0, 9, (3, 5))
    adapt = [{"method": "full", "target": "e"}, {**LORA, "target": "e"}]
    made = adapted(model, adapt, x)
    perturb(made.module)
    with pytest.raises(adaptc.RefusedError, match="the same tensor is also used by"):
        made.fold()
    live = adapted(model, [entry | {"on_alias": "live"} for entry in adapt], x)
    perturb(live.module)
    assert near(live.fold()(x), live.module.eval()(x))
