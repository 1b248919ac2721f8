"""ONNX decoders with a cache: names, dimensions, proofs, and a program that is verified by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

import adaptc
from adaptc.cli.inspection import verify
from adaptc.compiler.compiled import Compiled
from adaptc.compiler.proof.cached_runner import SCHEDULES, EncoderRunner, in_chunks, padded_left, where_seen
from adaptc.compiler.proof.runners import BatchRunner
from adaptc.emit.onnx.cached import encoder_beside, read_outputs, read_signature
from adaptc.emit.onnx.runtime import onnx_runner
from adaptc.errors import AdaptcError
from adaptc.ir.interpreter import Run
from tests.decoders import MIXES_TOKENS
from tests.families import DECODERS, Zoo, entry, marked, perturb, randomise


def emitted(compiled: Compiled, path: Path, **options: Any) -> Any:
    """The ONNX program with a cache."""
    compiled.emit("onnx", path, cache=True, **options)
    return onnx.load(path)


def dims(values: Any) -> dict[str, tuple[Any, ...]]:
    return {v.name: tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim) for v in values}


@pytest.fixture(scope="module")
def adapted(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> tuple[Compiled, Path]:
    """A Llama with LoRA, and its folded program with a cache."""
    compiled = zoo.compiled("llama", [entry("lora", "llama")])
    perturb(compiled.module)
    path = tmp_path_factory.mktemp("adapted") / "decoder.onnx"
    emitted(compiled, path)
    return compiled, path


def test_names_and_dimensions(adapted: tuple[Compiled, Path]) -> None:
    compiled, path = adapted
    model = onnx.load(path)
    inputs, outputs = dims(model.graph.input), dims(model.graph.output)
    assert inputs["input_ids"] == inputs["position_ids"] == ("batch", "seq")
    assert inputs["attention_mask"] == ("batch", "total")
    assert inputs["past_key_values.1.value"] == ("batch", 2, "past", 8)
    assert outputs["present.0.key"] == ("batch", 2, "total", 8)
    assert outputs["logits"][:2] == ("batch", "seq")
    titles = [proof.name for proof in compiled.proofs if "with a cache" in proof.name]
    assert titles == [f"onnx, folded, with a cache, {way}" for way in SCHEDULES]
    padded = [proof for proof in compiled.proofs if any("padded on the left" in s for s in proof.shapes)]
    assert len(padded) == len(SCHEDULES)


@pytest.mark.parametrize("adapters", ["folded", "live"])
@pytest.mark.parametrize("name", marked(DECODERS, ()))
def test_every_decoder(zoo: Zoo, name: str, adapters: str, tmp_path: Path) -> None:
    compiled = zoo.compiled(name, [entry("lora", name)])
    perturb(compiled.module)
    emitted(compiled, tmp_path / "decoder.onnx", adapters=adapters)
    assert sum("with a cache" in proof.name for proof in compiled.proofs) >= len(SCHEDULES)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["standard", "gqa"])
@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_an_encoder_is_a_program_of_its_own(zoo: Zoo, name: str, attention: str, tmp_path: Path) -> None:
    compiled = zoo.compiled(name, [entry("lora", name)])
    perturb(compiled.module)
    path = tmp_path / "decoder.onnx"
    model = emitted(compiled, path, attention=attention)
    inputs, given = dims(model.graph.input), dims(onnx.load(encoder_beside(path)).graph.output)
    assert not {"input_ids", "input_features"} & inputs.keys()
    assert inputs["past_key_values.0.cross.key"] == given["present.0.cross.key"]
    assert "encoder_last_hidden_state" in given
    checked = {row["what"] for row in verify(path)}
    assert {"decoder.onnx", "decoder.encoder.onnx"} <= checked


@pytest.mark.slow
@pytest.mark.parametrize("form", ["standard", "gqa"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_each_form_of_attention_in_16_bits(
    zoo: Zoo, name: str, dtype: str, form: str, tmp_path: Path
) -> None:
    """Errors are a few roundings of the dtype, whatever the proof allows."""
    compiled = zoo.compiled(name, [entry("lora", name)], dtype=dtype)
    perturb(compiled.module)
    emitted(compiled, tmp_path / "decoder.onnx", attention=form)
    product = json.loads((tmp_path / "manifest.json").read_text())["products"]["decoder.onnx"]
    assert (product["attention"][form], product["attention"]["why"]) == (2, [])
    assert product["proof"]["relative"] < 4 * torch.finfo(getattr(torch, dtype)).eps
    assert max(p.relative for p in compiled.proofs if "cache" in p.name) == product["proof"]["relative"]


@pytest.mark.slow
def test_a_decoder_that_rounds_activations_beside_its_encoder(zoo: Zoo, tmp_path: Path) -> None:
    int4 = {"method": "int4", "target": "all-linear", "block_size": 16}
    spec = {"base": zoo.base_of("bart"), "quantize": [int4]}
    compiled = adaptc.compile(spec)
    emitted(compiled, tmp_path / "decoder.onnx", adapters="none")
    proved = [proof.name for proof in compiled.proofs if "rounds activations" in proof.name]
    assert len(proved) == len(SCHEDULES)


def test_a_cached_program_is_verified_by_itself(adapted: tuple[Compiled, Path]) -> None:
    rows = verify(adapted[1])
    assert any("computes what its graph did" in row["checked"] for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [(), ("int4",)])
def test_adapters_are_swapped_on_a_decoder_with_a_cache(
    zoo: Zoo, bits: tuple[str, ...], tmp_path: Path
) -> None:
    compiled = adaptc.compile(
        {
            "base": zoo.base_of("llama"),
            "quantize": [{"method": name, "target": "all-linear", "block_size": 16} for name in bits],
            "adapters": {"alice": [entry("lora", "llama")], "bob": [entry("ia3", "llama")]},
        }
    )
    emitted(compiled, tmp_path / "base.onnx", adapters="swap")
    proved = {proof.name for proof in compiled.proofs}
    for who in ("onnx, swap", "onnx, swap, alice", "onnx, swap, bob", "onnx, swap, other ranks"):
        assert {f"{who}, with a cache, {way}" for way in SCHEDULES} <= proved


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_adapters_are_swapped_on_a_decoder_beside_its_encoder(zoo: Zoo, name: str, tmp_path: Path) -> None:
    """An adapter has tensors for both programs; each takes those that it declares."""
    compiled = adaptc.compile(
        {
            "base": zoo.base_of(name),
            "adapters": {
                n: [entry(m, name)] for n, m in (("alice", "lora"), ("bob", "ia3"), ("eve", "prefix"))
            },
        }
    )
    path = tmp_path / "base.onnx"
    model = emitted(compiled, path, adapters="swap")
    proved = {proof.name for proof in compiled.proofs}
    who = ("", ", alice", ", bob", ", eve", ", other ranks")
    assert {f"onnx, swap{one}, with a cache, {way}" for one in who for way in SCHEDULES} <= proved
    declared = [
        {weight.name for weight in each.graph.initializer} & {value.name for value in each.graph.input}
        for each in (model, onnx.load(encoder_beside(path)))
    ]
    assert all(declared)


def test_a_wrong_cache_fails_the_proof(adapted: tuple[Compiled, Path]) -> None:
    """The runner of proofs sees what one call with the whole prompt would not: keys that are not passed on."""
    compiled, path = adapted
    run = onnx_runner(path)

    def forgetful(tensors: Any) -> Any:
        forgotten = {n: t.roll(1, -1) if n.endswith(".key") else t for n, t in tensors.items()}
        return run(forgotten)

    batches = compiled.program.proofs.batches
    right = in_chunks(path, BatchRunner(run)).on(batches)
    wrong = in_chunks(path, BatchRunner(forgetful)).on(batches)
    label = next(label for label, batch in batches.items() if batch["input_ids"].shape[1] > 4)
    assert not torch.allclose(right.outcomes[label][0], wrong.outcomes[label][0], atol=1e-3)  # type: ignore[index]


def test_rows_padded_on_the_left_count_from_their_first_token(adapted: tuple[Compiled, Path]) -> None:
    compiled, path = adapted
    signature = read_signature(path)
    assert signature is not None
    batch = next(b for b in compiled.program.proofs.batches.values() if len(b["input_ids"]) == 3)
    padded = padded_left(signature, batch)
    assert padded is not None
    assert padded["attention_mask"].sum(1).tolist() == [17, 16, 15]
    assert padded["position_ids"][2, :4].tolist() == [0, 0, 0, 1]
    ones, twos = torch.ones(3, 17, 5), torch.full((3, 17, 5), 2.0)
    label = {"padded": padded}
    seen = where_seen(signature, Run(label, {"padded": [ones]}), Run(label, {"padded": [twos]}))
    (merged,) = seen.outcomes["padded"]  # type: ignore[misc]
    assert torch.equal(merged[:, :, 0], 1.0 + padded["attention_mask"])


def test_what_can_have_no_cache_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    make, says = MIXES_TOKENS["mean"]
    compiled = adaptc.compile({"inputs": {"input_ids": "int64[batch, seq]"}}, model=randomise(make()).eval())
    with pytest.raises(AdaptcError, match=says):
        compiled.emit("onnx", tmp_path / "decoder.onnx", cache=True)
    assert not list(tmp_path.iterdir())


def test_the_plan_refuses_a_cache_at_its_place_in_the_spec(tmp_path: Path) -> None:
    make, says = MIXES_TOKENS["cumsum"]
    emit = [{"format": "onnx", "path": str(tmp_path / "decoder.onnx"), "cache": True}]
    with pytest.raises(adaptc.SpecError) as caught:
        adaptc.compile({"inputs": {"input_ids": "int64[batch, seq]"}, "emit": emit}, model=randomise(make()))
    assert "emit.0.cache: this model can have no cache" in str(caught.value)
    assert says in str(caught.value)
    assert "decoders.py:" in str(caught.value)


@pytest.mark.slow
def test_the_encoder_runner_names_what_the_decoder_takes(zoo: Zoo, tmp_path: Path) -> None:
    compiled = zoo.compiled("t5", [])
    path = tmp_path / "decoder.onnx"
    emitted(compiled, path)
    encoder = encoder_beside(path)
    runner = EncoderRunner(BatchRunner(onnx_runner(encoder)), read_outputs(encoder))
    encoded = runner.on(compiled.program.proofs.batches)
    signature = read_signature(path)
    assert signature is not None
    for tensors in encoded.values():
        assert not isinstance(tensors, Exception)
        assert {spec.name for spec in signature.cross} <= tensors.keys()
