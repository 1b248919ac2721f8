"""What holds for every method of the registry where an ONNX program takes its adapters as inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptc.compiler.artifacts.swap import BASE
from adaptc.compiler.compiled import Compiled
from adaptc.emit.onnx.cached import read_signature
from adaptc.emit.onnx.runtime import open_session, session_call
from adaptc.errors import AdaptcError, SpecError
from adaptc.ir.module import bind
from adaptc.methods.method import METHODS
from adaptc.weights import Held
from tests.families import Zoo, close, differs, entry, inputs, outputs, perturbed

SWAPPED = {
    *(
        "adalora",
        "bitfit",
        "child-tuning",
        "delora",
        "dora",
        "dylora",
        "fishmask",
        "full",
        "ia3",
        "layernorm",
    ),
    *("hra", "lora", "miss", "p-tuning-v2", "prefix", "qalora", "randlora", "vblora", "vera"),
}
"""The methods that a program can take; the others are refused, each in its own words."""
REFUSED = sorted(METHODS.keys() - SWAPPED)


def one(method: str) -> str:
    """The base that stands for all."""
    kinds = METHODS[method].kinds
    return (
        "llama"
        if kinds <= {"embedding", "input", "attention", "head"}
        else "bert"
        if "parameter" in kinds
        else "block"
    )


def alternatives(zoo: Zoo, method: str, name: str, **spec: Any) -> Compiled:
    """A base with two alternatives: the method, and LoRA of another rank on the first layer."""
    adapters = {"it": [entry(method, name)], "other": [entry("lora", name, r=2)]}
    compiled = zoo.compiled(name, [], adapters=adapters, **spec)
    for number, alternative in enumerate(compiled.program.alternatives.values()):
        graph = alternative.graph
        values = perturbed({n: graph.weights[n].load() for n in graph.adapter_names}, seed=number)
        graph.weights.update({n: Held(value) for n, value in values.items()})
    return compiled


QUICK = ("lora", "bottleneck")
"""The methods of the quick laws."""


def marked(methods: Iterable[str]) -> list[Any]:
    return [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in methods]


@pytest.mark.parametrize("method", marked(sorted(SWAPPED)))
def test_a_swapped_adapter_computes_what_its_module_does(zoo: Zoo, method: str, tmp_path: Path) -> None:
    name = one(method)
    compiled = alternatives(zoo, method, name)
    compiled.emit("onnx", tmp_path / "base.onnx", adapters="swap")
    session = open_session(tmp_path / "base.onnx")
    batch = inputs(name)
    run: Callable[..., Any] = session_call(session)
    base = dict(zip(compiled.base.outputs, run(batch), strict=True))
    for output, value in zoo.run_eager(name, batch).items():
        close(base[output], value)
    for alternative, program in compiled.alternatives.items():
        path = tmp_path / f"{alternative}.onnx_adapter"
        compiled.emit("onnx-adapter", path, name=alternative)
        want = outputs(bind(program.live_graph()).eval(), batch, compiled.base.outputs)
        got = dict(zip(compiled.base.outputs, session_call(session, path)(batch), strict=True))
        for output, value in want.items():
            close(got[output], value, 4 * 512)
            differs(got[output], base[output])
    again = run(batch)
    assert all(torch.equal(a, b) for a, b in zip(base.values(), again, strict=True))
    assert {proof.name for proof in compiled.proofs} >= {
        BASE,
        f"{BASE}, it",
        f"{BASE}, other",
        f"{BASE}, other ranks",
    }


@pytest.mark.parametrize("method", marked(REFUSED))
def test_what_cannot_be_swapped_says_why(zoo: Zoo, method: str, tmp_path: Path) -> None:
    name = one(method)
    emit = [{"format": "onnx", "path": str(tmp_path / "base.onnx"), "adapters": "swap"}]
    with pytest.raises(
        SpecError, match=rf"adapters\.it\.0: 'it' cannot be swapped: {method} on .*: "
    ) as error:
        alternatives(zoo, method, name, emit=emit)
    assert "adapters: folded" in str(error.value)
    compiled = alternatives(zoo, method, name)  # it is refused only where it is to be swapped
    with pytest.raises(AdaptcError, match="cannot be swapped"):
        compiled.emit("onnx", tmp_path / "base.onnx", adapters="swap")


@pytest.mark.slow
@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("bits", ["float", "int4"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma2", "mixtral", "bert", "t5"])
def test_prefixes_are_swapped(zoo: Zoo, name: str, bits: str, cache: bool, tmp_path: Path) -> None:
    """Beyond a sliding window, over bits, behind a cache: no virtual tokens are the base, exactly."""
    if cache and name in ("bert", "t5"):
        pytest.skip("BERT has no cache; T5's two programs are proved in tests/emit/test_cached_onnx.py")
    spec = (
        {"quantize": [{"method": "int4", "target": "all-linear", "block_size": 16}]} if bits == "int4" else {}
    )
    compiled = alternatives(zoo, "prefix", name, **spec)
    options = {"cache": cache, "adapters": "swap", "round_activations": False}
    compiled.emit("onnx", tmp_path / "base.onnx", **options)
    session, batch = open_session(tmp_path / "base.onnx"), inputs(name)
    signature = read_signature(tmp_path / "base.onnx")
    whole = batch if signature is None else {**batch, **signature.empty(len(batch["input_ids"]))}
    logits = compiled.base.outputs.index("logits")

    def run(adapter: Any = None) -> torch.Tensor:
        return session_call(session, adapter)(whole)[logits]

    def want(program: Any) -> torch.Tensor:
        return outputs(bind(program.live_graph()).eval(), batch, compiled.base.outputs)["logits"]

    base = run()
    close(base, want(compiled.program), 4 * 512)
    slots = compiled.program.slots
    assert slots is not None
    assert slots.prefix is not None
    columns = slots.prefix.columns
    assert torch.equal(run({"virtual_tokens": torch.zeros(0, columns)}), base)
    for alternative, program in compiled.alternatives.items():
        path = tmp_path / f"{alternative}.onnx_adapter"
        compiled.emit("onnx-adapter", path, name=alternative)
        close(run(path), want(program), 4 * 512)
        differs(run(path), base)
    assert torch.equal(run(), base)


@pytest.mark.slow
def test_prefixes_of_one_program_are_at_the_same_attentions(zoo: Zoo) -> None:
    adapters = {
        "all": [entry("prefix", "llama")],
        "one": [{**entry("prefix", "llama"), "target": "*.layers.0.*"}],
    }
    emit = [{"format": "onnx", "path": "base.onnx", "adapters": "swap"}]
    with pytest.raises(
        SpecError, match=r"adapters\.one\.0.*at other attentions than those of another adapter"
    ):
        zoo.compiled("llama", [], adapters=adapters, emit=emit)


@pytest.mark.parametrize(
    ("method", "why"),
    [
        ("prompt", "its virtual tokens go through all layers"),
        ("bottleneck", "it is computed between the layers, and changes no weight"),
    ],
)
def test_what_is_no_weight_is_refused_in_clear_words(zoo: Zoo, method: str, why: str) -> None:
    emit = [{"format": "onnx", "path": "base.onnx", "adapters": "swap"}]
    with pytest.raises(SpecError, match=why) as caught:
        zoo.compiled("llama", [], adapters={"it": [entry(method, "llama")]}, emit=emit)
    assert "put it under `adapt`" in str(caught.value)
