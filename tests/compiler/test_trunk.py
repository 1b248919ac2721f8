"""The frozen trunk: what is stored, where it goes on, and that the rest trains as the whole does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import adaptc
from adaptc.compiler.compiled import Compiled
from tests.families import Zoo, inputs

LAST = "bert.encoder.layer.1.*"
CASES: dict[str, list[dict[str, Any]]] = {
    "probe": [{"method": "probe", "classes": 3, "target": "classifier"}],
    "lora in the last layer": [{"method": "lora", "r": 2, "target": [f"{LAST}.query", f"{LAST}.value"]}],
}


def batches(count: int = 3) -> list[dict[str, torch.Tensor]]:
    return [
        inputs("bert", 4, 6 + n, pad=True, seed=n) | {"classes": torch.tensor([0, 1, 1, 0])}
        for n in range(count)
    ]


def compiled_of(zoo: Zoo, case: str, dtype: str = "float32") -> Compiled:
    spec = {"base": zoo.base_of("bert", dtype=dtype), "adapt": CASES[case]}
    return adaptc.compile(spec)


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("case", CASES)
def test_the_rest_gives_the_outputs_and_gradients_of_the_whole(zoo: Zoo, case: str, tmp_path: Path) -> None:
    compiled = compiled_of(zoo, case, "float64")
    module, given = compiled.module.eval(), batches()
    rest = compiled.trunk(given, cache=tmp_path)
    assert len(rest) == 3
    assert {n for n, p in rest.module.named_parameters() if p.requires_grad} == set(
        compiled.graph.adapter_names
    )
    assert len(list(rest.module.parameters())) < len(list(module.parameters())) / 2
    for batch, stored in zip(given, rest, strict=True):
        target = batch["classes"]
        assert torch.equal(stored["classes"], target)
        whole = module(**{name: value for name, value in batch.items() if name != "classes"})["logits"]
        F.cross_entropy(whole, target).backward()
        want = {name: gradient.clone() for name, gradient in gradients(module).items()}
        module.zero_grad()
        part = rest.module(**stored)["logits"]
        F.cross_entropy(part, target).backward()
        torch.testing.assert_close(part, whole, rtol=1e-12, atol=1e-12)
        assert want.keys() == gradients(module).keys() == set(compiled.graph.adapter_names)
        for name, gradient in gradients(rest.module).items():
            torch.testing.assert_close(gradient, want[name], rtol=1e-10, atol=1e-12)
        module.zero_grad()


def test_what_is_trained_is_the_modules(zoo: Zoo, tmp_path: Path) -> None:
    compiled = compiled_of(zoo, "probe")
    given = batches(1)
    rest = compiled.trunk(given, cache=tmp_path / "cache")
    with torch.no_grad():
        for parameter in rest.module.parameters():
            parameter.add_(0.5)
        want = rest.module.eval()(**rest[0])["logits"]
    given[0].pop("classes")
    torch.testing.assert_close(compiled.module.eval()(**given[0])["logits"], want)
    adaptc.save_adapter(rest.module, tmp_path / "rest")
    other = compiled_of(zoo, "probe")
    other.load_adapter(tmp_path / "rest")
    torch.testing.assert_close(other.module.eval()(**given[0])["logits"], want)


def test_an_interrupted_cache_goes_on_where_it_was(zoo: Zoo, tmp_path: Path) -> None:
    compiled, given = compiled_of(zoo, "probe"), batches()

    def interrupted() -> Any:
        yield given[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compiled.trunk(interrupted(), cache=tmp_path)
    first = tmp_path / "000000.safetensors"
    before = first.stat().st_mtime_ns
    rest = compiled.trunk(given, cache=tmp_path)
    assert first.stat().st_mtime_ns == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{n:06d}.safetensors" for n in range(3)]
    whole, want = first.read_bytes(), {name: value.clone() for name, value in rest[0].items()}
    for damaged in (whole[:-8], whole[:-1] + bytes([whole[-1] ^ 1]), b"no safetensors"):
        first.write_bytes(damaged)
        with pytest.warns(UserWarning, match=r"000000\.safetensors: broken, and computed again"):
            compiled.trunk(given, cache=tmp_path)
        got = compiled.trunk(given, cache=tmp_path)[0]
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], want[name]) for name in want)


def test_a_cache_of_something_else_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    compiled, given = compiled_of(zoo, "probe"), batches()
    compiled.trunk(given, cache=tmp_path)
    with pytest.raises(
        adaptc.AdaptcError, match=r"000000\.safetensors: the cache is of another batch: \w{12}, here"
    ):
        compiled.trunk(given[::-1], cache=tmp_path)
    other = compiled_of(zoo, "lora in the last layer")
    with pytest.raises(adaptc.AdaptcError, match="the cache is of another trunk"):
        other.trunk(given, cache=tmp_path)


def test_batches_are_checked(zoo: Zoo, tmp_path: Path) -> None:
    compiled = compiled_of(zoo, "probe")
    lacking = batches(1)[0]
    del lacking["input_ids"]
    with pytest.raises(adaptc.AdaptcError, match="batch 0 lacks input_ids, which the model takes"):
        compiled.trunk([lacking], cache=tmp_path)
    with pytest.raises(adaptc.AdaptcError, match="batch 0: input_ids is a list, expected a tensor"):
        compiled.trunk([batches(1)[0] | {"input_ids": [1]}], cache=tmp_path)  # type: ignore[list-item]
    with pytest.raises(adaptc.AdaptcError, match="batch 0 is a list: expected a dict of tensors"):
        compiled.trunk([[1]], cache=tmp_path)  # type: ignore[list-item]


@pytest.mark.slow
def test_without_a_trunk_it_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    base = {"base": zoo.base_of("bert")}
    every = adaptc.compile({**base, "adapt": [{"method": "full", "target": "*"}]})
    with pytest.raises(adaptc.RefusedError, match="what is trained comes first in the model"):
        every.trunk(batches(), cache=tmp_path)
    with pytest.raises(adaptc.RefusedError, match="nothing trains"):
        adaptc.compile(base).trunk(batches(), cache=tmp_path)
