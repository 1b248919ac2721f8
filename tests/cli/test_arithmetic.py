"""`adaptc combine`, `convert` and `extract`, called in this process on a base that a spec's file names."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import adaptc
from tests.command_line import run
from tests.families import differs, perturb

MODEL = """\
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.query, self.norm, self.value = nn.Linear(16, width), nn.LayerNorm(width), nn.Linear(width, 16)

    def forward(self, x):
        return self.value(torch.tanh(self.norm(self.query(x))))


def build(seed=0, width=12):
    generator = torch.Generator().manual_seed(seed)
    model = Net(width)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return model
"""
BASE = """\
version: 1
base: {{python: "arithmetic_models:build", args: {{seed: {seed}}}}}
inputs: {{x: "float32[batch, 16]"}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two bases of one shape, and a trained adapter of LoRA and one of (IA)³ on the first."""
    path = tmp_path_factory.mktemp("arithmetic")
    (path / "arithmetic_models.py").write_text(MODEL)
    for seed in (0, 1):
        (path / f"base{seed}.yaml").write_text(BASE.format(seed=seed))
    sys.path.insert(0, str(path))
    for name, entry in {
        "a": "{method: lora, r: 3, target: '*'}",
        "b": "{method: ia3, target: '*', feedforward: [value]}",
    }.items():
        compiled = adaptc.compile(path / "base0.yaml", overrides=[f"adapt=[{entry}]"])
        perturb(compiled.module)
        compiled.save_adapter(path / name)
    yield path
    sys.path.remove(str(path))


def weights(folder: Path, *adapt: dict[str, object], seed: int = 0) -> dict[str, torch.Tensor]:
    """The weights of a base with adapters folded in."""
    base = {"python": "arithmetic_models:build", "args": {"seed": seed}}
    spec = {"base": base, "inputs": {"x": "float32[batch, 16]"}, "adapt": list(adapt)}
    module: nn.Module = adaptc.compile(spec).fold()
    return {name: tensor.detach() for name, tensor in module.state_dict().items()}


@pytest.mark.slow
def test_a_combination_of_two_methods_is_written(folder: Path) -> None:
    made = run(
        *("combine", folder / "a", folder / "b", "--weights", "-0.5,2", "--svd-rank", 12),
        *("--base", folder / "base0.yaml", "-o", folder / "ab", "--json"),
    )
    assert made.code == 0, made.err
    assert made.json["ranks"] == {"query": 12, "value": 12}
    assert max(made.json["errors"].values()) < 1e-5
    assert made.json["whole"] == ["query.bias"]  # (IA)³ scales it with the layer's output
    base, a, b, both = (
        weights(folder, *({"adapter": str(folder / name)} for name in names))
        for names in ([], ["a"], ["b"], ["ab"])
    )
    torch.testing.assert_close(both["value.bias"], base["value.bias"])
    for name in ("query.weight", "query.bias", "value.weight"):
        want = base[name] - 0.5 * (a[name] - base[name]) + 2 * (b[name] - base[name])
        differs(want, base[name])
        torch.testing.assert_close(both[name], want, rtol=1e-4, atol=1e-5)


def test_a_conversion_stands_beside_its_adapter_with_the_error_of_each_layer(folder: Path) -> None:
    made = run("convert", folder / "b", "--to", "lora", "--r", 12, "--base", folder / "base0.yaml")
    assert made.code == 0, made.err
    assert "relative error" in made.out
    assert f"wrote {folder / 'b-lora'}" in made.out
    want, got = (weights(folder, {"adapter": str(folder / name)}) for name in ("b", "b-lora"))
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-4, atol=1e-5)


def test_what_is_between_two_models_is_extracted(folder: Path) -> None:
    made = run(
        *("extract", folder / "base0.yaml", folder / "base1.yaml", "--r", 5),
        *("-o", folder / "between", "--json"),
    )
    assert made.code == 0, made.err
    assert made.json["ranks"] == {"query": 5, "value": 5}
    assert set(made.json["whole"]) == {"query.bias", "norm.weight", "norm.bias", "value.bias"}
    base, tuned = weights(folder), weights(folder, seed=1)
    got = weights(folder, {"adapter": str(folder / "between")})
    for name in made.json["whole"]:
        torch.testing.assert_close(got[name], tuned[name])
    for name in ("query", "value"):
        wanted, left = (t[f"{name}.weight"] - got[f"{name}.weight"] for t in (base, tuned))
        delta = tuned[f"{name}.weight"] - base[f"{name}.weight"]
        assert made.json["errors"][name] == pytest.approx(float(left.norm() / delta.norm()), rel=1e-4)
        values = torch.linalg.svdvals(delta)
        assert float(left.norm()) == pytest.approx(float(values[5:].norm()), rel=1e-3)
        differs(wanted, torch.zeros_like(wanted))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ("combine", "a", "b", "--weights", "1"),
            "--weights: expected one number for each of 2 adapters, got 1",
        ),
        (
            ("combine", "a", "b", "--weights", "1,x"),
            "--weights: expected numbers such as 0.7,-0.3, got '1,x'",
        ),
        (("combine", "a", "a", "--how", "tise"), "combine: how: expected"),
        (("combine", "a", "a", "--how", "ties"), "combine: how: ties prunes: it needs density, such as"),
        (
            ("combine", "a", "a", "--density", "0.5"),
            "combine: density: svd prunes nothing: leave density out",
        ),
        (
            ("combine", "a", "a", "--how", "cat", "--svd-rank", "3"),
            "combine: svd_rank: cat has the ranks of its adapters: leave svd_rank out, or write an svd",
        ),
        (
            ("combine", "a", "b", "--how", "linear"),
            "combine: combine.1.adapter: linear combines A and B of one product; ia3 has another form on query.weight",
        ),
        (("combine", "b", "b"), "combine: no adapter here has a rank that the result could have"),
        (
            ("convert", "a", "--to", "ia3", "--r", "2"),
            "to: ia3 cannot hold what other methods do",
        ),
        (("convert", "none", "--r", "2"), "none: no such directory"),
    ],
)
def test_what_cannot_be_done_is_told(
    folder: Path, words: tuple[str, ...], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    output = () if words[0] == "convert" else ("-o", "refused")
    made = run(*words, *output, "--base", "base0.yaml")
    assert told in made.err
    assert made.code == 2
    assert not Path("refused").exists()


def test_an_adapter_of_another_base_is_told_with_both_hashes(folder: Path) -> None:
    made = run("convert", folder / "a", "--r", 2, "--base", folder / "base1.yaml", "-o", folder / "refused")
    assert made.code == 1
    base, other = (
        adaptc.compile(folder / f"base{seed}.yaml", overrides=["adapt=[]"]).base_sha256 for seed in (0, 1)
    )
    assert (
        f"this adapter was trained on another base: its own has SHA-256 {base}, this one {other}" in made.err
    )


def test_models_that_cannot_be_compared_are_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    Path("narrow.yaml").write_text(BASE.format(seed="0, width: 10"))
    made = run("extract", "base0.yaml", "narrow.yaml", "--r", 2, "-o", "refused")
    assert made.code == 1
    assert (
        "narrow.yaml is of another shape than its base: query.weight is [10, 16], expected [12, 16]"
        in made.err
    )
    same = run("extract", "base0.yaml", "base0.yaml", "--r", 2, "-o", "refused")
    assert "base0.yaml has the same weights as base0.yaml: there is nothing to extract" in same.err
