"""What a saved adapter says, where a mistake in reading it would be silent."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.families import Zoo, differs, entry, evaluate, inputs, perturb, randomise
from tests.small_models import Normed, compiled, near


def test_a_method_over_a_loaded_adapter_starts_as_what_is_there(tmp_path: Path) -> None:
    x = torch.randn(4, 6)
    first = compiled(randomise(Normed()), [{"method": "lora", "target": "up", "r": 2}], x)
    perturb(first.module)
    first.save_adapter(tmp_path / "a")
    expected = first.module.eval()(x)
    adapt = [{"adapter": str(tmp_path / "a")}, {"method": "dora", "name": "second", "target": "up", "r": 2}]
    second = compiled(randomise(Normed()), adapt, x)
    assert near(second.module.eval()(x), expected)


@pytest.mark.parametrize("order", [["full", "lora"], ["a", "b"]])
def test_stacked_adapters_come_back_in_order(tmp_path: Path, order: list[str]) -> None:
    x = torch.randn(4, 6)
    lora = {"method": "lora", "target": "up", "r": 2}
    adapt = (
        [lora | {"name": name} for name in order]
        if order == ["a", "b"]
        else [{"method": "full", "target": "up"}, lora]
    )
    first = compiled(randomise(Normed()), adapt, x)
    perturb(first.module)
    first.save_adapter(tmp_path / "both")
    again = compiled(randomise(Normed()), [{"adapter": str(tmp_path / "both")}], x)
    assert near(again.module.eval()(x), first.module.eval()(x))


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.block = nn.ModuleDict({"fc": nn.Linear(6, 6)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block["fc"](F.relu(self.fc(x)))


def test_a_name_that_ends_another_is_saved_unmistakably(tmp_path: Path) -> None:
    x = torch.randn(4, 6)
    first = compiled(randomise(Nested()), [{"method": "lora", "target": "fc", "r": 2}], x)
    perturb(first.module)
    first.save_adapter(tmp_path / "a")
    again = compiled(randomise(Nested()), [{"adapter": str(tmp_path / "a")}], x)
    assert [site.module for site in again.plan.sites] == ["fc"]
    assert near(again.module.eval()(x), first.module.eval()(x))


@pytest.mark.slow
def test_order_of_two_methods_is_kept_in_what_is_saved(zoo: Zoo, tmp_path: Path) -> None:
    name = "bert"
    found = {}
    for order in (("lora", "ia3"), ("ia3", "lora")):
        compiled = zoo.compiled(name, [entry(m, name, name=m) for m in order])
        torch.manual_seed(3)
        with torch.no_grad():
            for _, p in sorted(compiled.module.named_parameters()):
                if p.requires_grad:
                    p.add_(0.1 * torch.randn_like(p))
        directory = tmp_path / "-".join(order)
        compiled.save_adapter(directory)
        again = zoo.compiled(name, [{"adapter": str(directory)}])
        assert [a.method.name for a in again.graph.adaptations] == [
            a.method.name for a in compiled.graph.adaptations
        ]
        tensors = inputs(name, 2, 4)
        want = evaluate(compiled.graph, tensors)["logits"]
        assert torch.equal(evaluate(again.graph, tensors)["logits"], want)
        compiled.load_adapter(directory)
        found[order] = want
    differs(*found.values())
