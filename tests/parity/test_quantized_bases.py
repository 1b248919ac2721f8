"""Checkpoints that other libraries have quantized: read in their own bits, number for number."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import adaptc
from adaptc.compiler.compiled import Compiled
from adaptc.errors import AdaptcError
from tests.families import close, marked

pytest.importorskip("transformers", reason="transformers is not installed")

DATA = Path(__file__).parents[1] / "data" / "quantized"
BY_GPTQMODEL = tuple(sorted(path.parent.name for path in DATA.glob("*/config.json")))
"""Written by GPTQModel, see `make.py` there."""
LAYERS = 7
KINDS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4, double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "wide storage": {"load_in_4bit": True, "bnb_4bit_quant_storage": torch.bfloat16},
    "8 bits": {"load_in_8bit": True},
}
LORA = {"method": "lora", "target": "all-linear", "r": 4}


def compiled(directory: Path, adapt: Any = (LORA,), **more: Any) -> Compiled:
    base = {"model": str(directory), "task": "causal-lm", **more.pop("base", {})}
    return adaptc.compile({"version": 1, "base": base, "adapt": list(adapt), **more})


def trained(made: Compiled) -> Compiled:
    """With adapters that are not zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in made.module.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.05, generator=generator)
    return made


@pytest.mark.parametrize("name", marked(BY_GPTQMODEL, ["awq", "gptq-2-bits", "gptq-ordered", "gptq-v2"]))
def test_weights_are_those_of_gptqmodel(name: str) -> None:
    made = compiled(DATA / name)
    expected = load_file(DATA / f"{name}.safetensors")
    assert len(expected) == 2
    for key, theirs in expected.items():
        ours = made.base.weights[f"model.{key}"].exact()
        assert ours.std() > 0.01
        assert torch.equal(ours.half(), theirs), key
    assert len(made.graph.quantized) == LAYERS
    assert all(q.quantization.packed is not None for q in made.graph.quantized.values())


@pytest.mark.parametrize("name", marked(BY_GPTQMODEL, ["gptq-asymmetric"]))
def test_bits_stay_bits(name: str) -> None:
    """What a module holds of the layers is the file's bytes, but for scales, which it has in float32."""
    made = compiled(DATA / name)
    held = made.module.state_dict()
    assert not {n for n in held if n.endswith("_proj.weight")}
    codes = sum(t.numel() for n, t in held.items() if n.endswith("weight_codes"))
    stored = load_file(DATA / name / "model.safetensors")
    assert codes == sum(4 * t.numel() for n, t in stored.items() if n.endswith("qweight"))


@pytest.mark.slow
@pytest.mark.parametrize("runtime", marked(["onnxruntime", "standard"], ["onnxruntime"]))
@pytest.mark.parametrize("name", marked(BY_GPTQMODEL, ["gptq-ordered"]))
def test_products_of_a_quantized_base(name: str, runtime: str, tmp_path: Path) -> None:
    made = trained(compiled(DATA / name))
    made.emit("onnx", tmp_path / "live.onnx", adapters="live", target_runtime=runtime)
    assert any(proof.name.startswith("onnx") for proof in made.proofs)
    if runtime == "standard":
        return
    made.emit("torch", tmp_path / "artifact")
    found = adaptc.load(tmp_path / "artifact")
    ids = torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        assert torch.equal(found(**given)["logits"], made.module.eval()(**given)["logits"])


@pytest.mark.slow
@pytest.mark.parametrize("name", marked(["gptq", "gptq-ordered"], ["gptq"]))
def test_folding_is_said_in_the_spec(name: str, tmp_path: Path) -> None:
    with pytest.raises(AdaptcError, match=r"fold into the dequantized weights, then quantize again"):
        compiled(DATA / name).emit("onnx", tmp_path / "a.onnx")
    floats = trained(compiled(DATA / name, passes=["insert", "fold"]))
    floats.emit("onnx", tmp_path / "floats.onnx")
    assert floats.quantization_errors("folded") is None
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "\n".join(
            json.dumps({"input_ids": list(range(i, i + 9)), "attention_mask": [1] * 9}) for i in range(20)
        )
    )
    calibration = {"calibration": str(rows)} if name == "gptq-ordered" else {}
    again = trained(compiled(DATA / name, passes=["insert", "fold", "quantize"], **calibration))
    again.emit("onnx", tmp_path / "again.onnx")
    assert again.quantization_errors() is None, "the live model has the base's own bits"
    errors = again.quantization_errors("folded")
    assert errors is not None
    assert len(errors.layers) == LAYERS
    assert all(0 < layer.weight < 0.2 for layer in errors.layers)


def test_quantizing_again_by_inputs_wants_them() -> None:
    with pytest.raises(AdaptcError, match="there is no data to quantize again by"):
        compiled(DATA / "gptq-ordered", passes=["insert", "fold", "quantize"])


def test_what_quantize_names_is_quantized_anew() -> None:
    entry = {"method": "int8", "target": "*.q_proj"}
    made = compiled(DATA / "gptq", quantize=[entry])
    schemes = {name: q.scheme.name for name, q in made.graph.quantized.items()}
    assert len(schemes) == LAYERS
    assert {name for name, scheme in schemes.items() if scheme == "int8"} == {
        "model.layers.0.self_attn.q_proj.weight"
    }
    assert any("quantized again" in note for note in made.plan.notes)


def test_a_new_head_is_initialised() -> None:
    base = {"task": "sequence-classification", "config": {"num_labels": 3}}
    made = compiled(DATA / "gptq", base=base)
    score = made.base.weights["score.weight"].load()
    assert score.shape == (3, 64)
    assert score.std() > 0
    assert torch.equal(score, compiled(DATA / "gptq", base=base).base.weights["score.weight"].load())
    assert any("score.weight" in note for note in made.base.source.bound.notes)
    assert len(made.graph.quantized) == LAYERS


@pytest.mark.parametrize("name", marked(BY_GPTQMODEL, ["gptq-v2"]))
@pytest.mark.parametrize("adapted", [True, False])
def test_a_checkpoint_of_what_the_bits_stand_for(name: str, adapted: bool, tmp_path: Path) -> None:
    """A merged checkpoint in floats that transformers loads, of layers with an adapter and of those without."""
    from transformers import AutoModelForCausalLM

    adapt = [LORA | {"target": ["*q_proj", "*down_proj"]}] if adapted else []
    made = compiled(DATA / name, adapt, passes=["insert", "fold"] if adapted else ["dequantize"])
    if adapted:
        trained(made)
    made.emit("hf", tmp_path / "merged")
    about = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in about
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    theirs, changed = loaded.state_dict(), []
    for key, weight in made.base.weights.items():
        if key in theirs and not torch.equal(theirs[key], weight.load()):
            changed.append(key.split(".")[-2])
    assert sorted(changed) == (["down_proj", "q_proj"] if adapted else [])
    ids = torch.randint(3, loaded.config.vocab_size, (3, 4), generator=torch.Generator().manual_seed(0))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        close(loaded(**given).logits, made.module.eval()(**given)["logits"], epsilons=4)


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of linears and one of Conv1D, which store their transposes."""
    import transformers

    torch.manual_seed(0)
    small: Any = {"bos_token_id": 1, "eos_token_id": 2}
    llama = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        tie_word_embeddings=False,
        **small,
    )
    gpt2 = transformers.GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=4, n_positions=32, **small)
    found = {}
    for name, config in (("llama", llama), ("gpt2", gpt2)):
        found[name] = tmp_path_factory.mktemp(name)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(found[name])
    return found


@pytest.mark.parametrize("kind", marked(KINDS, ["8 bits"]))
@pytest.mark.parametrize("model", marked(["llama", "gpt2"], ["llama"]))
def test_weights_are_those_of_bitsandbytes(
    floats: dict[str, Path], model: str, kind: str, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from bitsandbytes.functional import dequantize_4bit
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: Any = KINDS[kind]
    theirs = AutoModelForCausalLM.from_pretrained(
        floats[model], quantization_config=BitsAndBytesConfig(**options), device_map="cpu"
    )
    theirs.save_pretrained(tmp_path)
    made = compiled(tmp_path)
    modules = dict(theirs.named_modules())
    assert len(made.graph.quantized) == (7 if model == "llama" else 4)
    for name, q in made.graph.quantized.items():
        assert q.quantization.packed is not None
        weight = modules[name.removesuffix(".weight")].weight
        if "load_in_8bit" in options:
            want = weight.CB * (weight.SCB / 127).unsqueeze(1)
        else:  # flat, since its own gets rows wrong that end within a block, on the CPU
            state = weight.quant_state
            shape, state.shape = state.shape, torch.Size((1, state.shape.numel()))
            want = dequantize_4bit(weight.data, state).reshape(shape)
        assert torch.equal(q.quantization.dequantized(), want)
        assert torch.equal(made.base.weights[name].load(), want.t() if model == "gpt2" else want)
    if kind == "nf4, double":
        trained(made).emit("onnx", tmp_path / "live.onnx", adapters="live")


# what cannot be read


def broken(tmp_path: Path, name: str, tensors: Any = None, **about: Any) -> Path:
    directory = tmp_path / name
    shutil.copytree(DATA / name, directory)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] |= about
    (directory / "config.json").write_text(json.dumps(config))
    held = load_file(directory / "model.safetensors")
    if tensors is not None:
        tensors(held)
    save_file(held, directory / "model.safetensors")
    return directory


DOWN = "model.layers.0.mlp.down_proj"


def test_another_library(tmp_path: Path) -> None:
    with pytest.raises(
        AdaptcError, match=r"base\.model: .*'fp8', which adaptc does not read.*awq, bitsandbytes, gptq"
    ):
        compiled(broken(tmp_path, "gptq", quant_method="fp8"))


@pytest.mark.parametrize(
    ("name", "about", "words"),
    [
        ("gptq", {"bits": 3}, "3 bits in the format 'gptq'; expected 2, 4 or 8"),
        ("gptq", {"checkpoint_format": "marlin"}, "the format 'marlin'"),
        ("awq", {"version": "gemv"}, "the format 'gemv'; expected 4 in 'gemm'"),
        ("gptq", {"group_size": 24}, "expected groups of 24 inputs|power of two"),
        ("gptq", {"bits": 8}, "g_idx has shape .* do not belong together"),
        ("awq", {"bits": "four"}, "quantization_config.bits: expected a whole number, got 'four'"),
        ("awq", {"group_size": 0}, "group_size: expected -1 or more than 0, got 0"),
        ("awq", {"group_size": 64}, r"scales has shape \[2, 64\], expected \[1, 64\] for blocks of 64"),
        ("gptq", {"group_size": -1}, "for blocks of 64: quantization_config.group_size is another"),
    ],
)
def test_a_format_that_is_not_read(tmp_path: Path, name: str, about: Any, words: str) -> None:
    with pytest.raises(AdaptcError, match=words):
        compiled(broken(tmp_path, name, **about))


def test_a_tensor_is_missing(tmp_path: Path) -> None:
    with pytest.raises(AdaptcError, match=rf"{DOWN}\.scales is missing"):
        compiled(broken(tmp_path, "gptq", lambda held: held.pop(f"{DOWN}.scales")))


def test_zeros_that_are_not_symmetric(tmp_path: Path) -> None:
    made = compiled(broken(tmp_path, "gptq-asymmetric", sym=True))
    with pytest.raises(AdaptcError, match="calls its codes symmetric, but its zeros are not all 8"):
        _ = made.module


def test_groups_of_other_sizes(tmp_path: Path) -> None:
    def move(held: dict[str, torch.Tensor]) -> None:
        held[f"{DOWN}.g_idx"][0] = 1

    with pytest.raises(AdaptcError, match=rf"{DOWN}\.g_idx: expected groups of 32"):
        compiled(broken(tmp_path, "gptq", move))


def test_no_weights_at_all(tmp_path: Path) -> None:
    directory = broken(tmp_path, "gptq")
    (directory / "model.safetensors").unlink()
    with pytest.raises(AdaptcError, match=r"holds no weights; expected model\.safetensors"):
        compiled(directory)


@pytest.mark.parametrize("key", ["qweight", "qzeros"])
def test_bits_without_the_rest(tmp_path: Path, key: str) -> None:
    """A layer is never made up where the file holds parts of it."""
    with pytest.raises(AdaptcError, match=rf"{DOWN}\.{key} is missing: the checkpoint is not whole"):
        compiled(broken(tmp_path, "awq", lambda held: held.pop(f"{DOWN}.{key}")))


def test_scales_that_are_no_numbers(tmp_path: Path) -> None:
    def spoil(held: dict[str, torch.Tensor]) -> None:
        held[f"{DOWN}.scales"][0, 0] = float("nan")

    made = compiled(broken(tmp_path, "gptq", spoil))
    with pytest.raises(AdaptcError, match=rf"{DOWN}: its scales contain NaN or infinity"):
        _ = made.module


def test_another_weight_that_is_no_number(tmp_path: Path) -> None:
    def spoil(held: dict[str, torch.Tensor]) -> None:
        held["model.norm.weight"][3] = float("nan")

    made = compiled(broken(tmp_path, "gptq", spoil))
    with pytest.raises(AdaptcError, match=r"model\.norm\.weight contains NaN or infinity"):
        _ = made.module


def test_a_configuration_that_says_nothing(tmp_path: Path) -> None:
    directory = broken(tmp_path, "gptq")
    config = json.loads((directory / "config.json").read_text())
    about = config.pop("quantization_config")
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(AdaptcError, match=r"bits of a quantized weight, and config\.json has no quant"):
        compiled(directory)
    about.pop("quant_method")
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": about}))
    with pytest.raises(AdaptcError, match="expected a mapping with a quant_method"):
        compiled(directory)


def test_what_is_made_up_is_told(tmp_path: Path) -> None:
    made = compiled(broken(tmp_path, "gptq", lambda held: held.pop("model.norm.weight")))
    assert any("model.norm.weight" in note and "initialised" in note for note in made.plan.notes)


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        (".weight.absmax", r"absmax is missing: the checkpoint is not whole"),
        pytest.param(".weight.quant_map", r"quant_map is missing", marks=pytest.mark.slow),
        (".weight.quant_state.bitsandbytes__nf4", r"quant_state.bitsandbytes__nf4 is missing"),
        (".SCB", r"SCB is missing"),
    ],
)
def test_bitsandbytes_without_the_rest(
    floats: dict[str, Path], lost: str, words: str, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: Any = KINDS["8 bits" if lost == ".SCB" else "nf4"]
    theirs = AutoModelForCausalLM.from_pretrained(
        floats["llama"], quantization_config=BitsAndBytesConfig(**options), device_map="cpu"
    )
    theirs.save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    held.pop(f"{DOWN}{lost}")
    save_file(held, tmp_path / "model.safetensors")
    with pytest.raises(AdaptcError, match=words):
        _ = compiled(tmp_path).module


def test_floats_only(tmp_path: Path) -> None:
    emit = [{"format": "hf", "path": str(tmp_path / "x")}]
    with pytest.raises(
        AdaptcError,
        match=r"the base has weights in few bits.*\n.*write `passes: \[insert, fold\]` for the dequantized floats",
    ):
        compiled(DATA / "gptq", emit=emit)
    with pytest.raises(
        AdaptcError,
        match=r"the base has weights in few bits.*\n.*write `passes: \[dequantize\]` for the dequantized floats",
    ):
        compiled(DATA / "gptq", [], emit=emit)
    with pytest.raises(
        AdaptcError,
        match=r"the base has weights in few bits.*\n.*write `passes: \[insert, fold\]` for the dequantized floats",
    ):
        compiled(DATA / "gptq", passes=["insert", "fold", "quantize"], emit=emit)
    anew = [{"method": "nf4", "target": "*q_proj"}]
    with pytest.raises(
        AdaptcError, match=r"the base has weights in few bits.*\n.*write `passes: \[quantize, insert, fold\]`"
    ):
        compiled(DATA / "gptq", quantize=anew, emit=emit)
    with pytest.raises(AdaptcError, match=r"prefix.* cannot be folded into weights"):
        compiled(DATA / "gptq", [{"method": "prefix", "num_virtual_tokens": 2}], emit=emit)
    for adapt in ([], [LORA | {"target": "lm_head"}]):
        with pytest.raises(AdaptcError, match=r"the base has weights in few bits"):
            compiled(DATA / "gptq", adapt).emit("hf", tmp_path / "x")
        assert not (tmp_path / "x").exists()


def test_nothing_to_make_up_for() -> None:
    with pytest.raises(AdaptcError, match=r"the base stores .* quantized, without the floats"):
        compiled(DATA / "gptq", [LORA | {"init_weights": "loftq"}])
