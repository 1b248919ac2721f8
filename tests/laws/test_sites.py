"""What holds for every kind of place and every method that can sit there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adaptc.emit.onnx.runtime import onnx_runner
from adaptc.ir.graph import Graph
from adaptc.ir.module import bind
from adaptc.methods.method import METHODS, WeightMethod
from adaptc.passes import Factor, Fold
from adaptc.rewriter.catalog import load_passes
from adaptc.rewriter.pipeline import run
from adaptc.weights import Held
from tests.families import close, differs, perturb, perturbed
from tests.site_kinds import KINDS, SHAPES, Kind, Matrix, Museums, entry, inputs

SPELLED = (
    *("conv1d", "conv2d", "conv3d", "conv-same", "conv-grouped", "conv-transposed", "embedding", "linear"),
    *("conv1d-gpt2", "fused-rows", "einsum-heads", "experts-out-in", "attention"),
)
"""The kinds whose products are each spelled in a way of their own when they are taken apart."""
EVERYWHERE = ("lora", "dora", "ia3", "full")
"""Methods that are tested on every kind; the others on those above."""
Pair = tuple[str, str]
"""A kind and a method."""
PAIRS = [
    pytest.param((name, method), id=f"{name}-{method}", marks=[pytest.mark.slow] * (method != "lora"))
    for name, kind in KINDS.items()
    for method in METHODS
    if kind.takes(method) and (method in EVERYWHERE or name in SPELLED)
]
for_each_pair = pytest.mark.parametrize("pair", PAIRS, scope="module")
"""All laws run on one pair after the other."""
QUICK_SAVED = ("conv2d", "embedding", "fused-rows", "experts-out-in")
"""Kinds whose names and shapes in a checkpoint stand for the others."""
SAVED = [
    pytest.param((name, method), id=f"{name}-{method}", marks=[pytest.mark.slow] * later)
    for pair in PAIRS
    for name, method in pair.values
    for later in [method != "lora" or name not in QUICK_SAVED]
]


@dataclass(frozen=True)
class Sides:
    """One method on one kind, with random parameters: as inserted, factored and folded."""

    adapted: Graph
    factored: Graph
    folded: Graph


class Laws(Museums):
    """Museums, and what every method makes of each of their kinds."""

    def __init__(self) -> None:
        super().__init__()
        self._last: tuple[Pair, Sides] | None = None

    def sides(self, pair: Pair) -> Sides:
        """What is made of a pair; kept until another one is asked for."""
        if self._last is None or self._last[0] != pair:
            name, method = pair
            item = insert(name, method)
            skip_refused(self.graph(name), item)
            graph = run(self.graph(name), [item])
            values = perturbed({n: graph.weights[n].load() for n in graph.adapter_names})
            graph.weights.update({n: Held(value) for n, value in values.items()})
            # However short a sequence is, it is taken apart.
            self._last = pair, Sides(graph, run(graph, [Factor(tokens=1)]), run(graph, [Fold()]))
        return self._last[1]


@pytest.fixture(scope="module")
def museums() -> Iterator[Laws]:
    return Laws()


def skip_refused(graph: Graph, item: Any) -> None:
    sites = item.selection(graph).sites
    if not sites:
        pytest.skip(f"{item.method.name} finds nothing there")
    refused = next((reason for site in sites if (reason := item.refused(site))), None)
    if refused:
        pytest.skip(refused.reason)


def takes(museums: Laws, name: str, method: str) -> bool:
    item = insert(name, method)
    sites = item.selection(museums.graph(name)).sites
    return bool(sites) and not any(item.refused(site) for site in sites)


def insert(name: str, method: str, **options: Any) -> Any:
    given = entry(method, [name], **options)
    return load_passes()[f"insert-{given.pop('method')}"](**given)


def by_hand(model: nn.Module, kind: Kind, prefix: str, graph: Graph) -> nn.Module:
    """The model with every weight replaced by what the method's own equation makes of its matrices."""
    state = dict(model.state_dict())
    left = list(kind.matrices)
    for adaptation in graph.adaptations:
        site, method = adaptation.site, adaptation.method
        assert isinstance(method, WeightMethod)
        theta = {k: graph.weights[name].load() for k, (name, _) in adaptation.params.items()}
        own = method.stored(site)
        theta |= {k: p.unpack(theta[k]) for k, (_, p) in adaptation.params.items() if p.unpack is not None}
        if site.kind == "parameter":
            state[site.parameter] = method.weight(state[site.parameter], **theta)
            continue
        assert site.kind == kind.site
        matrix = [m for m in left if (prefix + m.parameter, m.rows) == (site.parameter, site.rows)]
        assert len(matrix) == 1, f"{site.parameter} {site.rows} is none of {left}"
        left.remove(matrix[0])
        state[site.parameter] = rewritten(state[site.parameter], matrix[0], method, theta, own)
        bias = site.parameter.replace("weight", "bias")
        if bias != site.parameter and bias in state and method.adapts_bias():
            changed, rows = state[bias].clone(), matrix[0].rows or ((0, len(state[bias])),)
            at = [row for start, stop in rows for row in range(start, stop)]
            changed[at] = method.bias(state[bias][at], **theta)
            state[bias] = changed
    assert not left or "parameter" in graph.adaptations[0].method.kinds, f"not adapted: {left}"
    model.load_state_dict(state)
    return model


def rewritten(
    W: torch.Tensor, matrix: Matrix, method: WeightMethod, theta: Mapping[str, torch.Tensor], own: Any
) -> torch.Tensor:
    read = matrix.read(W)
    if "e" not in matrix.axes:
        return matrix.write(W, method.weight(read[0], **theta)[None])
    each = [
        method.weight(M, **{k: v[e] if k in own else v for k, v in theta.items()}) for e, M in enumerate(read)
    ]
    return matrix.write(W, torch.stack(each))


@for_each_pair
def test_inserted_factored_and_folded_are_the_method_by_hand(museums: Laws, pair: Pair) -> None:
    name = pair[0]
    base, kind, sides = museums.graph(name), KINDS[name], museums.sides(pair)
    assert sides.folded.operations == base.operations
    assert not sides.folded.adapter_names
    want = by_hand(museums.fresh(name), kind, f"kinds.{name}.", sides.adapted)
    bound = [bind(graph).eval() for graph in (sides.adapted, sides.factored, sides.folded)]
    state = bound[2].state_dict()
    assert list(state) == list(want.state_dict())
    for key, value in want.state_dict().items():
        close(state[key], value, 16)
    for batch, length in SHAPES:
        tensors = inputs([name], batch, length, seed=batch)
        with torch.no_grad():
            expected, plain = (model(**tensors)[name] for model in (want, museums.model(name)))
            for module in bound:
                close(module(**tensors)[name], expected)
    differs(expected, plain)


@for_each_pair
def test_factored_gradients_are_those_of_the_expression(museums: Laws, pair: Pair) -> None:
    name = pair[0]
    sides, tensors = museums.sides(pair), inputs([name], *SHAPES[2], pad=False)
    found = []
    for graph in (sides.adapted, sides.factored):
        module = bind(graph, graph.adapter_names).eval()
        y = module(**tensors)[name]
        (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
        found.append({n: p.grad for n, p in module.named_parameters() if p.requires_grad})
    want, got = found
    assert set(want) == set(sides.adapted.adapter_names)
    for key, gradient in want.items():
        assert gradient is not None, f"{key} gets no gradient"
        assert gradient.abs().max() > 0, f"{key} gets a gradient of zero"
        assert got[key] is not None, f"{key} gets no gradient when factored"
        close(got[key], gradient)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "some"), [("lora", 4), *(pytest.param(m, 1, marks=pytest.mark.slow) for m in METHODS)]
)
def test_all_kinds_at_once_train_fold_and_run_in_onnx_runtime(
    museums: Laws, method: str, some: int, tmp_path: Path
) -> None:
    """One kind in `some`: the folded program is the base's, whatever was folded in."""
    names = [n for n, kind in KINDS.items() if kind.takes(method) and takes(museums, n, method)][::some]
    if not names:
        pytest.skip(f"{method} finds nothing there")
    compiled, model = museums.compiled(names, entry(method, names)), museums.model(*names)
    module = compiled.module.eval()
    shapes = [inputs(names, *shape) for shape in SHAPES]
    if METHODS[method].identity_at_init:
        with torch.no_grad():
            want, got = model(**shapes[0]), module(**shapes[0])
        for name in names:
            close(got[name], want[name])
    perturb(module)
    compiled.check_gradients()
    folded = compiled.fold()
    compiled.emit("onnx", tmp_path / "m.onnx")
    program = onnx_runner(tmp_path / "m.onnx")
    for tensors in shapes:
        with torch.no_grad():
            want, merged = module(**tensors), folded(**tensors)
        for name, value in zip(compiled.base.outputs, program(tensors), strict=True):
            close(merged[name], want[name])
            close(value, want[name])


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_kinds_run_live_in_onnx_runtime(museums: Laws, method: str, tmp_path: Path) -> None:
    names = [n for n in SPELLED if KINDS[n].takes(method) and takes(museums, n, method)]
    if not names:
        pytest.skip(f"{method} finds nothing there")
    compiled = museums.compiled(names, entry(method, names))
    perturb(compiled.module)
    compiled.emit("onnx", tmp_path / "m.onnx", adapters="live")
    program, module = onnx_runner(tmp_path / "m.onnx"), compiled.module.eval()
    for shape in SHAPES:
        tensors = inputs(names, *shape)
        with torch.no_grad():
            want = module(**tensors)
        for name, value in zip(compiled.base.outputs, program(tensors), strict=True):
            close(value, want[name])


@pytest.mark.parametrize("pair", SAVED, scope="module")
def test_what_is_saved_is_what_is_loaded(museums: Laws, pair: Pair, tmp_path: Path) -> None:
    """In PEFT's format where PEFT has this method on this kind, in adaptc's own where it has not."""
    name, method = pair
    skip_refused(museums.graph(name), insert(name, method))
    compiled = museums.compiled([name], entry(method, [name]))
    perturb(compiled.module)
    compiled.save_adapter(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert bool(config["peft_type"]) == KINDS[name].in_peft(method)
    again = museums.compiled([name], {"adapter": str(tmp_path)})
    tensors = inputs([name], *SHAPES[2])
    with torch.no_grad():
        want = bind(compiled.graph).eval()(**tensors)[name]
        assert torch.equal(bind(again.graph).eval()(**tensors)[name], want)
        differs(want, museums.model(name)(**tensors)[name])
        for parameter in compiled.module.parameters():
            parameter.mul_(1.25 if parameter.requires_grad else 1)
        compiled.load_adapter(tmp_path)
        assert torch.equal(bind(compiled.graph).eval()(**tensors)[name], want)
