"""What holds on other devices than the CPU: shown on the meta device, and on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import adaptc
from adaptc.ir.module import bind
from adaptc.methods.method import METHODS
from adaptc.quantization.scheme import SCHEMES
from tests.families import FAMILIES, Zoo, entry, inputs, marked

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


QUICK = ("lora", "fourierft", "bottleneck", "prompt")
"""Methods that stand for all in the quick tests: with constants of their own and without, on every kind of place."""


class OneDevice(TorchDispatchMode):
    """No operation finds tensors on two devices, but for single numbers and those that move them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor) and a.dim()]
        found = sorted({tensor.device.type for tensor in given})
        assert len(found) < 2 or func is torch.ops.aten._to_copy.default, (
            f"{func} finds {' and '.join(found)}"
        )
        return func(*args, **(kwargs or {}))


def elsewhere(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> set[str]:
    """Where the outputs are when all that a module holds and is given is on another device."""
    module = module.to("meta")
    with OneDevice(), torch.no_grad():
        found = pytree.tree_leaves(module(**{n: t.to("meta") for n, t in tensors.items()}))
    return {leaf.device.type for leaf in found if isinstance(leaf, torch.Tensor)}


@pytest.mark.parametrize("name", marked(FAMILIES, ["llama", "resnet"]))
def test_a_graph_runs_where_its_weights_are(zoo: Zoo, name: str) -> None:
    assert elsewhere(bind(zoo.graph(name)).eval(), inputs(name)) == {"meta"}


@pytest.mark.parametrize("method", marked(sorted(METHODS), QUICK))
def test_every_method_runs_where_its_weights_are(zoo: Zoo, method: str) -> None:
    for name in ("mlp", "llama", "bert"):
        try:
            made = zoo.compiled(name, [entry(method, name)])
        except adaptc.AdaptcError:
            continue
        for graph in (made.graph, made.live_graph()):
            assert elsewhere(bind(graph).eval(), inputs(name)) == {"meta"}
        return
    pytest.fail("no family has a layer for it")


@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_every_scheme_unpacks_where_its_bits_are(name: str) -> None:
    scheme = SCHEMES[name](**SCHEMES[name].small)
    rows, columns = 6, 64
    held = {n: (k.shape, getattr(torch, k.dtype)) for n, k in scheme.stored(rows, columns).items()}
    held |= {n: (t.shape, t.dtype) for n, t in scheme.constants().items()}
    shape_of_codes = held["codes"][0]
    fakes = {n: torch.empty(shape, dtype=dtype, device="meta") for n, (shape, dtype) in held.items()}
    with OneDevice():
        W = scheme.unpack(rows, columns, fakes, torch.bfloat16)
        assert (W.device.type, W.dtype, tuple(W.shape)) == ("meta", torch.bfloat16, (rows, columns))
        if "embedding" in scheme.kinds:
            ids = torch.empty(2, 3, dtype=torch.int64, device="meta")
            assert scheme.lookup(rows, columns, fakes, ids).device.type == "meta"
        with pytest.raises(AssertionError, match="finds cpu and meta"):
            scheme.unpack(
                rows, columns, fakes | {"codes": torch.zeros(shape_of_codes, dtype=torch.uint8)}, W.dtype
            )
