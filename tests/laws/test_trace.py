"""A traced base is the model: same values, same randomness, same names, and no weight read."""

from __future__ import annotations

import pytest
import torch

import adaptc
from adaptc.compiler.driver import plan
from adaptc.ir.module import bind
from adaptc.weights import Stored
from tests.families import (
    FAMILIES,
    HUGGING_FACE,
    PLAIN,
    SHAPES,
    Zoo,
    close,
    entry,
    inputs,
    marked,
    outputs,
    without_cache,
)

FEW = 8
"""Epsilons: the same operations run in the same order."""


@pytest.mark.parametrize("name", marked(FAMILIES))
def test_traced_graph_computes_the_model(zoo: Zoo, name: str) -> None:
    graph = zoo.graph(name)
    module = bind(graph).eval()
    for number, (batch, length) in enumerate(SHAPES):
        tensors = inputs(name, batch, length, pad=number == 0, seed=number)
        with torch.no_grad():
            want = zoo.run_eager(name, tensors)
            got = outputs(module, tensors, graph.outputs)
        for output in graph.outputs:
            close(got[output], want[output], FEW)


NARROW = [(n, "bfloat16") for n in FAMILIES] + [(n, "float16") for n in ("llama", "t5", *PLAIN)]
"""Every family; in float16 one that is narrow as a whole, and one of which a part stays wide."""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), NARROW)
def test_traced_graph_computes_the_narrow_model(zoo: Zoo, name: str, dtype: str) -> None:
    graph, kind = zoo.graph(name, dtype), getattr(torch, dtype)
    if name in HUGGING_FACE:  # as transformers narrows it: what it keeps wide stays wide
        eager = type(zoo.eager(name)).from_pretrained(zoo.directory(name), dtype=kind).eval()
    else:
        eager = zoo.fresh(name).to(kind)
    module = bind(graph).eval()
    for number, (batch, length) in enumerate(SHAPES):
        tensors = {
            key: value.to(kind) if value.is_floating_point() else value
            for key, value in inputs(name, batch, length, pad=number == 0, seed=number).items()
        }
        with torch.no_grad():
            want = outputs(eager, tensors, graph.outputs, **without_cache(eager))
            got = outputs(module, tensors, graph.outputs)
        for output in graph.outputs:
            assert want[output].dtype == kind
            close(got[output], want[output], FEW)


@pytest.mark.parametrize("name", marked(FAMILIES, ("llama", *PLAIN)))
def test_train_mode_draws_the_models_own_dropout(zoo: Zoo, name: str) -> None:
    compiled = zoo.compiled(name, [entry("lora", name)])  # of its own: batch norm's buffers change
    module, eager = compiled.module.train(), zoo.fresh(name).train()
    for batch, length in ((2, 7), (3, 5)):
        tensors = inputs(name, batch, length, pad=True)
        torch.manual_seed(11)
        want = zoo.run_eager(name, tensors, eager)
        state = torch.random.get_rng_state()
        torch.manual_seed(11)
        got = outputs(module, tensors, compiled.graph.outputs)
        assert torch.equal(state, torch.random.get_rng_state()), "another number of draws"
        for output in compiled.graph.outputs:
            close(got[output], want[output], FEW)
    theirs = dict(eager.named_buffers())
    for key, buffer in module.named_buffers():
        if key in theirs:
            close(buffer.double(), theirs[key].double(), FEW, torch.float32)


@pytest.mark.parametrize("name", marked(FAMILIES, ("bert", *PLAIN)))
def test_train_mode_is_random_and_eval_is_not(zoo: Zoo, name: str) -> None:
    if name in ("raw", "resnet"):
        pytest.skip("no dropout in this model")
    compiled = zoo.initial("lora", name)
    tensors = inputs(name, 3, 9)
    key = compiled.graph.outputs[0]
    module = compiled.module.train()
    assert not torch.equal(*(outputs(module, tensors, [key])[key] for _ in range(2)))
    module.eval()
    assert torch.equal(*(outputs(module, tensors, [key])[key] for _ in range(2)))


@pytest.mark.parametrize("name", marked(FAMILIES))
def test_state_dict_names_are_the_bases(zoo: Zoo, name: str) -> None:
    compiled = zoo.initial("lora", name)
    own = set(compiled.graph.adapter_names)
    assert own
    state = compiled.module.state_dict()
    theirs = zoo.eager(name).state_dict()
    assert [key for key in state if key not in own] == list(theirs)
    for key, parameter in zoo.eager(name).named_parameters():
        assert torch.equal(state[key], parameter), key


@pytest.mark.parametrize("name", marked(HUGGING_FACE, ("bert",)))
def test_planning_reads_no_weight(zoo: Zoo, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import adaptc.tracing.huggingface.model as huggingface

    def read(*args: object, **kwargs: object) -> None:
        raise AssertionError("a weight was read")

    base = zoo.base_of(name)
    monkeypatch.setattr(Stored, "load", read)
    monkeypatch.setattr(huggingface, "pretrained_weights", read)
    _, found = plan(
        {"base": base, "adapt": [entry(m, name, name=m) for m in ("full", "lora", "dora", "ia3")]}
    )
    assert all(planned.selection.sites for planned in found.entries)
    if name != "bert":
        return
    with pytest.raises(AssertionError, match="a weight was read"):
        adaptc.compile({"base": base, "adapt": [entry("lora", name)]}).module  # noqa: B018 (made on access)


@pytest.mark.parametrize("name", marked(HUGGING_FACE))
def test_parameters_of_the_trace_are_fake(zoo: Zoo, name: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensor

    module = zoo.graph(name).module
    assert all(isinstance(p.data, FakeTensor) or isinstance(p, FakeTensor) for p in module.parameters())


@pytest.mark.parametrize("name", PLAIN)
def test_tracing_leaves_the_users_module_alone(zoo: Zoo, name: str) -> None:
    model = zoo.fresh(name).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    compiled = adaptc.compile(
        {"adapt": [entry("lora", name)]},
        model=model,
        example_inputs=inputs(name, 3, 11),
        dynamic=zoo.dynamic(name),
    )
    compiled.module.train()(**inputs(name, 4, 3))
    assert model.training
    assert list(model.state_dict()) == list(before)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(p.requires_grad for p in model.parameters())
