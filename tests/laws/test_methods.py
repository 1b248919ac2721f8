"""What holds for every adaptation method of the registry, on every base."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import adaptc
from adaptc.errors import SpecError
from adaptc.ir.analysis.matrix_products import MATRIX_PRODUCTS
from adaptc.ir.graph import Graph
from adaptc.ir.module import bind
from adaptc.methods.activation import ActivationMethod
from adaptc.methods.head import HeadMethod
from adaptc.methods.method import METHODS, WeightMethod
from adaptc.methods.virtual_tokens import PromptMethod
from adaptc.rewriter.catalog import load_passes
from adaptc.rewriter.insert.base import Insert
from adaptc.rewriter.pipeline import run
from adaptc.weights import Held
from tests.families import (
    FAMILIES,
    HUGGING_FACE,
    QUICK,
    SHAPES,
    Zoo,
    close,
    differs,
    entry,
    evaluate,
    field_names,
    inputs,
    marked,
    outputs,
    perturb,
    perturbed,
)

FIRST = ("lora",)
"""Methods that are tested on several bases in the quick laws; the others are on one."""


def one(method: str) -> str:
    """The base that stands for all."""
    kinds = METHODS[method].kinds
    return "llama" if kinds <= {"embedding", "input", "head"} else "bert" if "parameter" in kinds else "block"


def quick(method: str, name: str) -> bool:
    if method not in FIRST:
        return name == one(method)
    return name in QUICK and name != "t5"


MASK = 7
"""The token at which a cloze reads."""
Pair = tuple[str, str]
"""A method and a base."""


def pairs(quick: Callable[[str, str], bool], bases: Iterable[str] = FAMILIES) -> list[Any]:
    """Every method on every base, slow where it is not quick; with `by_pair`, all laws run on one after the other."""
    return [
        pytest.param((method, name), id=f"{method}-{name}", marks=[pytest.mark.slow] * (not quick(method, name)))
        for name in bases
        for method in METHODS
    ]  # fmt: skip


by_pair = partial(pytest.mark.parametrize, "pair", scope="module")
EVERY = pairs(quick)
ANYWHERE = ("lora", "bitfit", "bottleneck", "prefix", "prompt", "probe", "trainable-tokens")
"""Methods that stand for their kind of place: a weight, a bias, an activation, attention, an input, a head, rows."""
SPREAD = [pair for pair in EVERY for method, name in pair.values if method in ANYWHERE or name == one(method)]
"""Every method on one base, and those that stand for a kind of place on all."""
TWINS = ("qwen3", "mistral", "gemma2", "roberta")
"""Bases with the layers of another one, under the same names: of Llama or BERT."""
ONCE_EACH = [name for name in FAMILIES if name not in TWINS]
ONCE = pairs(lambda method, name: name == one(method), ONCE_EACH)
"""Every method on each base with layers of its own, quick on one: for laws of a method's own, whatever it is on."""


SEEDED = [
    pytest.param(
        (method, name),
        id=f"{method}-{name}",
        marks=[pytest.mark.slow] * (method not in ("lora", "vera", "prompt")),
    )
    for method in METHODS
    for name in [one(method)]
]
"""Every method once; quick are one of each way to start: a matrix, tensors that all share, tokens."""


def stays(method: str) -> bool:
    """Whether it is no weight expression, so that a folded graph has it too."""
    return not issubclass(METHODS[method], WeightMethod)


def is_made(method: str, name: str) -> bool:
    """Whether what is saved is made from what is trained, so that training cannot go on from it."""
    made = insert(method, name).method
    return isinstance(made, PromptMethod) and made.plain != made


def is_head(method: str) -> bool:
    """Whether it gives an output of its own, in the place of one of the base's."""
    return issubclass(METHODS[method], HeadMethod)


def skip_without_site(zoo: Zoo, method: str, name: str) -> None:
    item: Insert = insert(method, name)
    selection = item.selection(zoo.graph(name))
    if not selection.sites:
        pytest.skip(f"{method} sits on {sorted(item.method.kinds)}, of which {name} has none")
    if quick(method, name):
        return
    refused = next((reason for site in selection.sites if (reason := item.refused(site))), None)
    if refused:
        pytest.skip(f"{method} on {name}: {refused.reason}")
    if name == "whisper" and issubclass(METHODS[method], ActivationMethod):
        with pytest.raises(SpecError, match=r"no residual sum was found downstream of model\.encoder\.conv2"):
            zoo.initial(method, name)
        pytest.skip(f"{method} on {name}: nothing is added to a convolution's output")


def insert(method: str, name: str, **options: Any) -> Any:
    """The pass that inserts a method into a family."""
    given = entry(method, name, **options)
    given.pop("method")
    return load_passes()[f"insert-{method}"](**given)


def adapted_graph(zoo: Zoo, method: str, name: str, dtype: str) -> Graph:
    """The adapted graph in a dtype, with perturbed adapters."""
    graph = run(zoo.graph(name, dtype), [insert(method, name)])
    values = perturbed({n: graph.weights[n].load() for n in graph.adapter_names})
    graph.weights.update({n: Held(value) for n, value in values.items()})
    return graph


@by_pair(SPREAD)
def test_starts_as_the_base(zoo: Zoo, pair: Pair) -> None:
    method, name = pair
    skip_without_site(zoo, method, name)
    if not METHODS[method].identity_at_init:
        pytest.skip(f"{method} says that it starts elsewhere")
    compiled = zoo.initial(method, name)
    module = compiled.module.eval()
    for batch, length in SHAPES[:2]:
        tensors = inputs(name, batch, length, pad=batch == 2)
        with torch.no_grad():
            want, got = zoo.run_eager(name, tensors), outputs(module, tensors, compiled.graph.outputs)
        for key in want:
            close(got[key], want[key])


@by_pair(EVERY)
def test_factored_and_folded_equal_the_expression(zoo: Zoo, pair: Pair) -> None:
    method, name = pair
    skip_without_site(zoo, method, name)
    base, passes = zoo.graph(name), load_passes()
    graph = zoo.adapted(method, name).graph
    new = is_head(method)
    factored, folded = run(graph, [passes["factor"]()]), run(graph, [passes["fold"]()])
    if stays(method):
        lost = Counter(base.operations) - Counter(folded.operations) if not new else Counter[str]()
        assert not {op for op in lost if op.split(".")[1] in MATRIX_PRODUCTS}, lost
        assert len(folded.operations) <= len(factored.operations)
        assert set(bind(base).state_dict()) < set(bind(folded).state_dict())
    else:
        assert folded.operations == base.operations
        assert list(bind(folded).state_dict()) == list(bind(base).state_dict())
        assert not folded.adapter_names
    bound = [bind(g).eval() for g in (graph, factored, folded)]
    for number, (batch, length) in enumerate(SHAPES):
        tensors = inputs(name, batch, length, pad=number == 0, seed=number)
        want, one, other = (evaluate(graph, tensors, module) for module in bound)
        for key in want:
            close(one[key], want[key])
            close(other[key], want[key])
        if number == 0 and not new:
            differs(want[base.outputs[0]], evaluate(base, tensors)[base.outputs[0]])


@by_pair(EVERY)
def test_compiled_module_equals_its_fold(zoo: Zoo, pair: Pair) -> None:
    method, name = pair
    skip_without_site(zoo, method, name)
    compiled = zoo.adapted(method, name)
    folded, module = compiled.fold(), compiled.module.eval()
    names = [n for n in folded.state_dict() if n in zoo.eager(name).state_dict() or not stays(method)]
    assert names == list(zoo.eager(name).state_dict())
    tensors = inputs(name, 4, 6, pad=True)
    with torch.no_grad():
        want = outputs(module, tensors, compiled.graph.outputs)
        got = outputs(folded, tensors, compiled.graph.outputs)
        base = zoo.run_eager(name, tensors)
    for key in want:
        close(got[key], want[key])
    if not is_head(method):
        differs(want[compiled.base.outputs[0]], base[compiled.base.outputs[0]])
    assert "fold" in {proof.name for proof in compiled.proofs}


@by_pair(SPREAD)
def test_only_the_adaptation_trains(zoo: Zoo, pair: Pair) -> None:
    method, name = pair
    skip_without_site(zoo, method, name)
    compiled = zoo.adapted(method, name)
    module = compiled.module.train()
    wanted = set(compiled.graph.adapter_names)
    assert {n for n, p in module.named_parameters() if p.requires_grad} == wanted
    found = outputs(module, inputs(name, 3, 6), compiled.graph.outputs)
    torch.manual_seed(1)
    sum((value * torch.randn(value.shape)).sum() for value in found.values()).backward()
    for key, parameter in module.named_parameters():
        if key in wanted:
            assert parameter.grad is not None, f"{key} gets no gradient"
            assert parameter.grad.abs().max() > 0, f"{key} gets a gradient of zero"
        else:
            assert parameter.grad is None, f"{key} is frozen, but gets a gradient"


@by_pair(SPREAD)
def test_training_lowers_the_loss(zoo: Zoo, pair: Pair) -> None:
    method, name = pair
    skip_without_site(zoo, method, name)
    compiled = zoo.adapted(method, name)
    module = compiled.module.eval()  # without dropout, so that the loss is the same function at each step
    tensors, key = inputs(name, 4, 6), compiled.graph.outputs[0]
    frozen = {n: p.clone() for n, p in module.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=1e-3)
    goal = outputs(module, tensors, [key])[key].detach()
    perturb(module, seed=6)  # the adapters that reach the goal exist, so there is a way down
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = F.mse_loss(outputs(module, tensors, [key])[key], goal)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses
    for n, parameter in module.named_parameters():
        if n in frozen:
            assert torch.equal(parameter, frozen[n]), n


@by_pair(ONCE)
def test_checkpoint_round_trip(zoo: Zoo, pair: Pair, tmp_path: Path) -> None:
    method, name = pair
    skip_without_site(zoo, method, name)
    compiled = zoo.adapted(method, name)
    tensors = inputs(name, 2, 5)
    module = compiled.module.eval()
    with torch.no_grad():
        want = outputs(module, tensors, compiled.graph.outputs)
    saved = {n: compiled.graph.weights[n].load().clone() for n in compiled.graph.adapter_names}
    compiled.save_adapter(tmp_path / "first")
    assert not list((tmp_path / "first").rglob("*.bin"))
    with torch.no_grad():
        for n, parameter in module.named_parameters():
            if n in saved:
                parameter.mul_(0.5).add_(0.25)
    if is_made(method, name):
        with pytest.raises(adaptc.AdaptcError, match=r"compile it with that option, or with `adapter:"):
            compiled.load_adapter(tmp_path / "first")
        made = zoo.compiled(name, [{"adapter": str(tmp_path / "first")}]).module.eval()
        with torch.no_grad():
            got = outputs(made, tensors, compiled.graph.outputs)
    else:
        compiled.load_adapter(tmp_path / "first")
        with torch.no_grad():
            got = outputs(module, tensors, compiled.graph.outputs)
    for key in want:
        if is_made(method, name):
            close(got[key], want[key])
        else:
            assert torch.equal(got[key], want[key])
    adaptc.save_adapter(module, tmp_path / "second")
    again = zoo.compiled(name, [{"adapter": str(tmp_path / "second")}])
    assert [a.site for a in again.graph.adaptations] == [a.site for a in compiled.graph.adaptations]
    want = evaluate(compiled.graph, tensors)
    got = evaluate(again.graph, tensors)
    if is_made(method, name):
        for key in want:
            close(got[key], want[key])
        return
    for n, value in saved.items():
        assert torch.equal(again.graph.weights[n].load(), value), n
    for key in want:
        assert torch.equal(got[key], want[key])


@by_pair(SEEDED)
def test_initialisation_follows_the_seed(zoo: Zoo, pair: Pair) -> None:
    method, name = pair
    skip_without_site(zoo, method, name)

    def initial(**seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(torch.seed() % 2**31)  # the global generator must not matter
        graph = run(zoo.graph(name), [insert(method, name, **seed)])
        return {n: graph.weights[n].load() for n in graph.adapter_names}

    graph = zoo.initial(method, name).graph
    one, same, other = initial(), initial(), initial(seed=4)
    assert list(one) == list(same)
    assert all(torch.equal(one[n], same[n]) for n in one)
    drawn = [n for n in one if one[n].numel() > 1 and not torch.equal(one[n], other[n])]
    params = [p for a in graph.adaptations for _, p in a.params.values() if p.trained]
    assert bool(drawn) == any(_draws(param.init) for param in params)
    random = [one[n] for n in drawn]
    for first, second in pairwise(random):
        if first.shape == second.shape:
            assert not torch.equal(first, second), "two layers start with the same numbers"


def _draws(init: Any) -> bool:
    """Whether an initialisation depends on the generator."""
    if isinstance(init, str):
        return init in ("kaiming-uniform", "normal", "standard-normal")
    used = torch.Generator().manual_seed(1)
    before = used.get_state()
    init(torch.ones(64, 64), used)
    return not torch.equal(before, used.get_state())


NARROW = [
    pytest.param(method, name, dtype, id=f"{method}-{name}-{dtype}", marks=[pytest.mark.slow] * later)
    for name, dtype in (("gpt2", "float16"), ("llama", "bfloat16"), ("block", "bfloat16"))
    for method in METHODS
    for later in [(method, name) != ("lora", "gpt2") and (dtype == "float16" or name != one(method))]
]


@pytest.mark.parametrize(("method", "name", "dtype"), NARROW)
def test_a_narrow_fold_rounds_once(zoo: Zoo, method: str, name: str, dtype: str) -> None:
    """The folded weight is the float32 evaluation of the method's own formula, rounded once."""
    skip_without_site(zoo, method, name)
    if stays(method):
        pytest.skip(f"{method} folds into no weight")
    graph = adapted_graph(zoo, method, name, dtype)
    folded = run(graph, [load_passes()["fold"]()])
    assert {w.dtype for w in folded.weights.values() if w.dtype.is_floating_point} >= {getattr(torch, dtype)}
    for adaptation in graph.adaptations:
        site, wide = adaptation.site, adaptation.method
        assert isinstance(wide, WeightMethod)
        theta = {k: graph.weights[n].load() for k, (n, _) in adaptation.params.items()}
        theta = {k: v.float() if v.dtype.is_floating_point else v for k, v in theta.items()}
        W = graph.weights[site.parameter].load().float()
        turned = site.transposed or site.kind == "embedding"
        W = W.t() if turned else W
        exact = wide.weight(W, **theta)
        exact = exact.t() if turned else exact
        got = folded.weights[site.parameter].load()
        assert got.dtype == getattr(torch, dtype)
        assert torch.equal(got, exact.to(got.dtype)), site.module
        if site.bias is not None and wide.adapts_bias():
            b = wide.bias(graph.weights[site.bias].load().float(), **theta)
            assert torch.equal(folded.weights[site.bias].load(), b.to(got.dtype)), site.bias


@pytest.mark.parametrize("method", marked(METHODS, ("lora", "bottleneck")))
def test_branch_dropout_is_on_the_branch_in_training_only(zoo: Zoo, method: str) -> None:
    if "dropout" not in field_names(method):
        pytest.skip(f"{method} has no dropout")
    # a base that draws no random number of its own
    name = one(method) if is_head(method) else "block" if stays(method) else "raw"
    compiled = zoo.compiled(name, [entry(method, name, dropout=0.5)])
    module, tensors = compiled.module, inputs(name, 3, 5)
    if "input_ids" in tensors:
        tensors["input_ids"][:, 1] = MASK
    key = compiled.graph.outputs[0]

    def once(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        with torch.no_grad():
            return outputs(module, tensors, [key])[key]

    module.train()
    if method == "lora":  # B is zero: what the branch drops changes nothing, so the base's term is whole
        close(once(1), zoo.run_eager(name, tensors)[key].detach())
    with torch.no_grad():
        for n, value in perturbed({n: p for n, p in module.named_parameters() if p.requires_grad}).items():
            module.get_parameter(n).copy_(value)
    assert torch.equal(once(1), once(1))
    differs(once(1), once(2))
    module.eval()
    still = once(1)
    assert torch.equal(still, once(2))
    twin = zoo.compiled(name, [entry(method, name, dropout=0.0)])
    with torch.no_grad():
        for n, p in twin.module.named_parameters():
            if p.requires_grad:
                p.copy_(module.get_parameter(n))
        close(still, outputs(twin.module.eval(), tensors, [key])[key])


COMPILED = [
    pytest.param(
        (method, name),
        id=f"{method}-{name}",
        marks=[pytest.mark.slow] * ((method, name) != ("lora", "block")),
    )
    for name in FAMILIES
    for method in METHODS
    if method == "lora" or name == one(method)
]


@by_pair(COMPILED)
def test_torch_compile_takes_the_whole_graph(zoo: Zoo, pair: Pair) -> None:
    method, name = pair
    skip_without_site(zoo, method, name)
    if method != "lora" and name in HUGGING_FACE:
        pytest.skip("lora stands for the others on these")
    compiled = zoo.adapted(method, name)
    module = compiled.module.eval()
    torch._dynamo.reset()
    fast = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch, length in ((2, 7), (3, 5)):
        tensors = inputs(name, batch, length, pad=True)
        got, want = (outputs(m, tensors, compiled.graph.outputs) for m in (fast, module))
        for key in want:
            close(got[key], want[key])
    sum(value.sum() for value in got.values()).backward()
    assert any(p.grad is not None for p in module.parameters() if p.requires_grad)


def test_options_of_every_method_are_documented() -> None:
    for name, cls in METHODS.items():
        assert dataclasses.is_dataclass(cls), name
        assert "=" in (cls.__doc__ or "").strip().splitlines()[0], f"{name}: the first line is its equation"
