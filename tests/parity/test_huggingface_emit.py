"""`emit: hf` writes what `save_pretrained` of PEFT's merged model writes, and transformers loads it."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import fx, nn

import adaptc
from adaptc.checkpoints import shards
from adaptc.checkpoints.huggingface_layout import saved_weights
from adaptc.cli.inspection import inspect, verify
from adaptc.compiler.artifacts.emit import emit_all
from adaptc.compiler.compiled import Compiled
from adaptc.emit import huggingface
from adaptc.emit.huggingface import save_checkpoint
from adaptc.errors import AdaptcError, ProofError, RefusedError
from adaptc.spec.spec import dump, load
from adaptc.weights import Deferred, Held
from tests.families import (
    FAMILIES,
    VOCABULARY,
    Zoo,
    close,
    differs,
    inputs,
    marked,
    outputs,
    perturb,
    randomise,
)  # fmt: skip

peft = pytest.importorskip("peft")

TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "tied llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "bert": ["query", "dense"],
    "t5": ["q", "v", "wo"],
}
SHARD = "20KB"
AUTO = {
    "llama": "AutoModelForCausalLM",
    "tied llama": "AutoModelForCausalLM",
    "gpt2": "AutoModelForCausalLM",
    "bert": "AutoModelForSequenceClassification",
    "t5": "AutoModelForSeq2SeqLM",
}
LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@dataclass
class Merged:
    """One adapter, folded and written by adaptc, merged and saved by PEFT."""

    name: str
    compiled: Compiled
    ours: Path
    theirs: Path
    model: nn.Module
    adapter: Path

    def run(self, model: nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        more = {"use_cache": False} if self.name != "bert" else {}
        with torch.no_grad():
            return outputs(model.eval(), tensors, self.compiled.base.outputs, **more)


def saved(model: nn.Module, directory: Path) -> nn.Module:
    randomise(model)
    model.tie_weights()  # type: ignore[operator]
    model.save_pretrained(directory)  # type: ignore[operator]
    return model.eval()


@pytest.fixture(scope="module")
def merged(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Merged]:
    made: dict[str, Merged] = {}

    def adapted(name: str, adapter: Path, root: Path) -> tuple[nn.Module, Callable[[], Compiled]]:
        if name != "tied llama":
            return zoo.fresh(name), lambda: zoo.compiled(name, [{"adapter": str(adapter)}])
        config = transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True)
        base = {"model": str(root / "base"), "task": "causal-lm"}
        model = saved(transformers.LlamaForCausalLM(config), root / "base")
        return model, lambda: adaptc.compile({"base": base, "adapt": [{"adapter": str(adapter)}]})

    def make(name: str) -> Merged:
        if name not in made:
            root = tmp_path_factory.mktemp(name.replace(" ", "-"))
            model, compile_ = adapted(name, root / "adapter", root)
            more = {"modules_to_save": ["classifier"], "task_type": "SEQ_CLS"} if name == "bert" else {}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                theirs = peft.get_peft_model(
                    model, peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS[name], **more)
                )
                perturb(theirs)
                theirs.save_pretrained(root / "adapter")
                compiled = compile_()
                compiled.emit("hf", root / "ours", max_shard_size=SHARD)
                model = theirs.merge_and_unload().eval()
                model.save_pretrained(root / "theirs", max_shard_size=SHARD)
            made[name] = Merged(name, compiled, root / "ours", root / "theirs", model, root / "adapter")
        return made[name]

    return make


def tensors_in(directory: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    return found


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def product_of(directory: Path) -> dict[str, Any]:
    return read(directory / "manifest.json")["products"]["checkpoint"]


def loaded_from(directory: Path, name: str, **more: Any) -> nn.Module:
    model, info = getattr(transformers, AUTO[name]).from_pretrained(
        directory, output_loading_info=True, **more
    )
    assert not any(info.values()), info
    return model.eval()


# what is written


@pytest.mark.parametrize("name", marked(TARGETS, ["tied llama", "gpt2"]))
def test_it_is_what_save_pretrained_writes(merged: Callable[[str], Merged], name: str) -> None:
    """The same files, shards, names and configuration; the same tensors to the last few bits."""
    case = merged(name)
    assert {p.name for p in case.ours.iterdir()} == {p.name for p in case.theirs.iterdir()} | {
        "manifest.json"
    }
    files = [f for f in ("config.json", "generation_config.json") if (case.theirs / f).exists()]
    for file in ("model.safetensors.index.json", *files):
        assert read(case.ours / file) == read(case.theirs / file), file
    got, want = tensors_in(case.ours), tensors_in(case.theirs)
    assert set(got) == set(want)
    for key, value in want.items():
        close(got[key], value, 16)
    proof = product_of(case.ours)["proof"]
    assert 0 <= proof["relative"] <= proof["tolerance"]


@pytest.mark.parametrize("name", marked(TARGETS, ["tied llama", "gpt2", "bert"]))
def test_transformers_loads_it(merged: Callable[[str], Merged], name: str) -> None:
    case = merged(name)
    model = loaded_from(case.ours, name)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    state, folded = model.state_dict(), case.compiled.fold().state_dict()
    assert list(state) == list(folded)
    assert all(torch.equal(value, folded[key]) for key, value in state.items())
    family = "llama" if name == "tied llama" else name
    tensors = inputs(family, 3, 6, pad=True)
    got, want = case.run(model, tensors), case.run(case.model, tensors)
    for key in want:
        close(got[key], want[key])
    base = getattr(transformers, AUTO[name]).from_pretrained(case.compiled.base.source.pretrained.name)  # type: ignore[union-attr]
    differs(want["logits"], case.run(base, tensors)["logits"])


QUANTIZED = {
    "gpt2": ("*.c_attn[q,v]", "*.c_fc", "*wte"),
    "llama": ("all-linear",),
    "mixtral": ("*.experts", "*.q_proj"),
}


@pytest.mark.parametrize("name", marked(QUANTIZED, ["gpt2"]))
def test_an_adapter_that_was_trained_on_bits(zoo: Zoo, name: str, tmp_path: Path) -> None:
    """Floats of what the bits stand for, with the adapter folded in: slices, tied heads and experts too."""
    made = zoo.compiled(
        name,
        [{"method": "lora", "target": list(FAMILIES[name].target), "r": 4}],
        quantize=[{"method": "nf4", "target": list(QUANTIZED[name]), "block_size": 32}],
        passes=["quantize", "insert", "fold"],
    )
    perturb(made.module)
    made.emit("hf", tmp_path / "merged")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    for key, weight in made.base.weights.items():
        q = made.graph.quantized.get(made.base.aliases[key])
        if q is not None and key in model.state_dict():
            assert not torch.equal(model.state_dict()[key], weight.load()), "it is what the bits stand for"
    assert (name == "gpt2") == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    errors = product_of(tmp_path / "merged")["quantization"]
    assert len(errors["layers"]) == len(made.graph.quantized)
    assert 0 < errors["outputs"]["logits"] < 0.5
    tensors = inputs(name, 3, 6, pad=True)
    with torch.no_grad():
        want = made.module.eval()(**tensors)["logits"]
        close(model(**tensors, use_cache=False).logits, want)
        differs(zoo.eager(name)(**tensors, use_cache=False).logits, want)


@pytest.mark.parametrize("name", ["bert", pytest.param("llama", marks=pytest.mark.slow)])
def test_in_bfloat16(zoo: Zoo, merged: Callable[[str], Merged], name: str, tmp_path: Path) -> None:
    """Folded in float32 and rounded once; the configuration says what dtype it is."""
    adapter = merged(name).adapter
    base = zoo.base_of(name, dtype="bfloat16")
    compiled = adaptc.compile({"base": base, "adapt": [{"adapter": str(adapter)}]})
    compiled.emit("hf", tmp_path / "merged")
    assert read(tmp_path / "merged/config.json")["dtype"] == "bfloat16"
    assert not (tmp_path / "merged/model.safetensors.index.json").exists()
    model = loaded_from(tmp_path / "merged", name)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    wide = merged(name).model.state_dict()
    for key, value in model.state_dict().items():
        close(value, wide[key].to(torch.bfloat16), 2)
    assert product_of(tmp_path / "merged")["rounding"]


@pytest.mark.slow
def test_a_head_of_another_size(zoo: Zoo, tmp_path: Path) -> None:
    """The configuration is that of the spec: its overrides, the class of its task, and not what a trace needs."""
    zoo.directory("bert")
    transformers.BertModel.from_pretrained(zoo.root / "bert").save_pretrained(tmp_path / "base")
    spec = {
        "base": {
            "model": str(tmp_path / "base"),
            "task": "token-classification",
            "config": {"num_labels": 5},
        },
        "adapt": [
            {"method": "lora", "target": "*.query", "r": 2},
            {"method": "full", "target": "classifier"},
        ],
    }
    compiled = adaptc.compile(spec)
    perturb(compiled.module)
    compiled.emit("hf", tmp_path / "merged")
    config = read(tmp_path / "merged/config.json")
    assert config["architectures"] == ["BertForTokenClassification"]
    assert len(config["id2label"]) == 5
    assert config["use_cache"] is True
    model = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "merged")
    trained = compiled.module.get_parameter("classifier.full.default.weight")
    assert torch.equal(model.classifier.weight, trained)


def test_what_a_trace_turns_off_and_what_config_json_says_of_generation(tmp_path: Path) -> None:
    """Layers are dropped in training as before, and beams that only an old config.json names are kept."""
    config = transformers.BartConfig(
        vocab_size=VOCABULARY, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, encoder_layerdrop=0.25,
        max_position_embeddings=64,
    )  # fmt: skip
    base = tmp_path / "base"
    saved(transformers.BartForConditionalGeneration(config), base)
    (base / "generation_config.json").unlink()
    (base / "config.json").write_text(json.dumps(read(base / "config.json") | {"num_beams": 4}))
    spec = {"base": {"model": str(base), "task": "seq2seq-lm"}}
    compiled = adaptc.compile(spec | {"adapt": [{"method": "lora", "target": "*.q_proj", "r": 2}]})
    compiled.emit("hf", tmp_path / "merged")
    written = read(tmp_path / "merged/config.json")
    assert written["encoder_layerdrop"] == 0.25
    assert written["use_cache"] is True
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged")
    assert model.generation_config.num_beams == 4


# other layouts


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    base = tmp_path_factory.mktemp("mixtral")
    saved(transformers.MixtralForCausalLM(transformers.MixtralConfig(**LLAMA, num_local_experts=4)), base)
    entries = [
        {"method": "lora", "target": "*.q_proj", "r": 2},
        {"method": "full", "target": "*.layers.1.mlp.experts"},
    ]
    compiled = adaptc.compile({"base": {"model": str(base), "task": "causal-lm"}, "adapt": entries})
    generator = torch.Generator().manual_seed(3)
    for name in compiled.graph.adapter_names:
        value = compiled.graph.weights[name].load()
        noise = torch.randn(value.shape, generator=generator)
        compiled.graph.weights[name] = Held(value + 0.1 * noise)
    return compiled


@pytest.mark.slow
def test_experts_stand_apart_in_the_checkpoint(mixtral: Compiled, tmp_path: Path) -> None:
    """As transformers saves them, for whatever else reads Mixtral; it fuses them again, bit for bit."""
    mixtral.emit("hf", tmp_path / "merged", max_shard_size=SHARD)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    folded = mixtral.fold().state_dict()
    assert all(torch.equal(value, folded[key]) for key, value in model.state_dict().items())
    model.save_pretrained(tmp_path / "theirs", max_shard_size=SHARD)
    got, want = tensors_in(tmp_path / "merged"), tensors_in(tmp_path / "theirs")
    assert "model.layers.1.block_sparse_moe.experts.3.w1.weight" in got
    assert set(got) == set(want)
    assert all(torch.equal(value, want[key]) for key, value in got.items())


def test_a_fused_tensor_is_loaded_once(mixtral: Compiled) -> None:
    """And let go when the next one is asked for."""
    loads: list[str] = []
    base = mixtral.base.source.model
    assert base is not None
    weights = {}
    for name, tensor in base.state_dict().items():

        def make(name: str = name, shape: Any = tensor.shape) -> torch.Tensor:
            loads.append(name)
            return torch.zeros(shape)

        weights[name] = Deferred(tuple(tensor.shape), torch.float32, make)
    stored = saved_weights(base, weights)
    assert loads == []
    assert len(stored) > len(weights)
    for weight in stored.values():
        assert tuple(weight.load().shape) == weight.shape
    assert sorted(loads) == sorted(weights)


@pytest.mark.parametrize("name", marked(["tied llama", "gpt2", "t5"], ["gpt2"]))
def test_a_head_that_was_untied(merged: Callable[[str], Merged], name: str, tmp_path: Path) -> None:
    """Both tensors are written, and the configuration says that they are two."""
    adapt = [{"method": "lora", "target": "lm_head", "r": 2, "on_alias": "untie"}]
    compiled = adaptc.compile({"base": dump(merged(name).compiled.spec)["base"], "adapt": adapt})
    perturb(compiled.module)
    compiled.emit("hf", tmp_path / "merged")
    assert read(tmp_path / "merged/config.json")["tie_word_embeddings"] is False
    written = tensors_in(tmp_path / "merged")
    embedding = compiled.base.aliases["lm_head.weight"]
    assert not torch.equal(written["lm_head.weight"], written[embedding])
    model = loaded_from(tmp_path / "merged", name)
    assert torch.equal(model.get_parameter("lm_head.weight"), written["lm_head.weight"])
    assert torch.equal(model.get_parameter(embedding), compiled.base.weights[embedding].load())


# what stands beside the weights


BESIDE = {
    "tokenizer.json": "{}",
    "tokenizer_config.json": '{"model_max_length": 64}',
    "vocab.txt": "a\nb\n",
    "special_tokens_map.json": "{}",
    "preprocessor_config.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "LICENSE": "as is",
    "README.md": "# a model",
    "1_Pooling/config.json": '{"pooling_mode_mean_tokens": true}',
}
OWN_WEIGHTS = ["model.safetensors", "pytorch_model.bin", "onnx/model.onnx", "tf_model.h5", "x.gguf"]
DROPPED = [*OWN_WEIGHTS, "manifest.json", ".cache/huggingface/x.json", "adapter_config.json"]


def test_files_are_carried_over(zoo: Zoo, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(zoo.directory("gpt2"), base)
    (base / "generation_config.json").write_text('{"num_beams": 3, "eos_token_id": 2}')
    for name, text in {**BESIDE, **dict.fromkeys(DROPPED[1:], "{}")}.items():
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(text)
    merged = tmp_path / "build/merged"
    spec = {
        "base": {"model": str(base), "task": "causal-lm"},
        "adapt": [{"method": "lora", "target": "*.c_fc", "r": 2}],
        "emit": [{"format": "hf", "path": str(merged)}],
    }
    compiled = adaptc.compile(spec)
    emit_all(compiled.program, compiled.spec.emit)
    written = {str(p.relative_to(merged)) for p in merged.rglob("*") if p.is_file()}
    assert written == {
        *BESIDE, "config.json", "generation_config.json", "model.safetensors", "manifest.json",
    }  # fmt: skip
    for name in BESIDE:
        assert (merged / name).read_bytes() == (base / name).read_bytes(), name
    assert (merged / "generation_config.json").read_bytes() == (base / "generation_config.json").read_bytes()
    assert product_of(merged)["left_out"] == sorted(OWN_WEIGHTS)
    assert set(product_of(merged)["files"]) == written - {"manifest.json"}
    shown = {row["what"]: row["value"] for row in inspect(merged)}
    assert shown["checkpoint"].startswith("hf, ")
    assert shown["checkpoint: class"] == "GPT2LMHeadModel"
    checked = {row["what"]: row["checked"] for row in verify(merged)}
    assert checked["checkpoint"].startswith("computes what its graph did")
    (merged / "manifest.json").unlink()
    assert {row["what"]: row["value"] for row in inspect(merged)}["class"] == ["GPT2LMHeadModel"]


def test_a_hub_id_takes_them_from_the_cache(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "models--someone--tiny"
    shutil.copytree(zoo.directory("bert"), cached / "snapshots/0123")
    (cached / "snapshots/0123/vocab.txt").write_text("a\n")
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    base = {"model": "someone/tiny", "task": "sequence-classification"}
    compiled = adaptc.compile({"base": base, "adapt": [{"method": "lora", "target": "*.query", "r": 2}]})
    compiled.emit("hf", tmp_path / "merged")
    assert (tmp_path / "merged/vocab.txt").read_text() == "a\n"
    loaded_from(tmp_path / "merged", "bert")


# what is refused, and what does not hold


def test_a_base_of_ones_own(zoo: Zoo, tmp_path: Path) -> None:
    compiled = zoo.compiled("mlp", [{"method": "lora", "target": "up", "r": 2}])
    with pytest.raises(AdaptcError, match="needs a Hugging Face base"):
        compiled.emit("hf", tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_a_model_in_place_of_the_specs_own(zoo: Zoo, tmp_path: Path) -> None:
    """The directory that the spec names is not where the weights came from."""
    compiled = adaptc.compile(
        {"base": zoo.base_of("bert"), "adapt": [{"method": "lora", "target": "up", "r": 2}]},
        model=zoo.fresh("mlp"),
        example_inputs=inputs("mlp"),
    )
    with pytest.raises(AdaptcError, match="needs a Hugging Face base"):
        compiled.emit("hf", tmp_path / "merged")


def other_activation(node: fx.Node) -> None:
    node.target = torch.ops.aten.relu.default


def other_scale(node: fx.Node) -> None:
    node.kwargs = {**node.kwargs, "scale": 0.5}


@pytest.mark.parametrize(
    ("operation", "change"),
    [("aten.silu.default", other_activation), ("aten.scaled_dot_product_attention.default", other_scale)],
)
def test_a_pass_that_changes_the_program(
    zoo: Zoo, tmp_path: Path, operation: str, change: Callable[[fx.Node], None]
) -> None:
    """Nowhere in the class could the change be kept, however alike the weights are."""
    base = zoo.graph("llama")
    changed = base.copy()
    for node in [n for n in changed.nodes if str(n.target) == operation][:1]:
        change(node)
    with pytest.raises(RefusedError, match="which a checkpoint of LlamaForCausalLM cannot hold"):
        save_checkpoint(changed, base, tmp_path / "merged", "1GB")
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_forgotten(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """from_pretrained would initialise it anew, and say so in a warning."""
    real = huggingface.saved_names
    monkeypatch.setattr(huggingface, "saved_names", lambda *args: real(*args)[:-1])
    with pytest.raises(ProofError, match=r"missing_keys: classifier\.bias"):
        zoo.compiled("bert", []).emit("hf", tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_the_folded_ones(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is loaded is held against the folded graph, not against what was written."""
    real = huggingface.saved_weights

    def wrong(model: nn.Module, weights: Any) -> Any:
        stored = real(model, weights)
        name = "bert.encoder.layer.0.output.dense.weight"
        return stored | {name: Held(stored[name].load() * 1.01)}

    monkeypatch.setattr(huggingface, "saved_weights", wrong)
    with pytest.raises(ProofError, match="the proof failed: hf"):
        zoo.compiled("bert", []).emit("hf", tmp_path / "merged")


def test_a_model_larger_than_memory(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not loaded, which is said in place of a proof."""
    monkeypatch.setattr(huggingface, "LOADED_SHARE", 10**12)
    monkeypatch.setattr(
        "adaptc.compiler.artifacts.emit.load_checkpoint", lambda *args: pytest.fail("it was loaded")
    )
    zoo.compiled("bert", []).emit("hf", tmp_path / "merged")
    product = product_of(tmp_path / "merged")
    assert "proof" not in product
    assert product["checked"].startswith("read back tensor by tensor; not loaded")
    loaded_from(tmp_path / "merged", "bert")


def test_an_interrupted_write_leaves_the_old_one(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, write = zoo.compiled("bert", []), shards._write
    compiled.emit("hf", tmp_path / "merged")

    def contents() -> dict[str, bytes]:
        return {str(p.relative_to(tmp_path)): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    before = contents()
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):
        calls = 0

        def fail(file: Any, name: str, weight: Any, error: BaseException = error) -> str:
            nonlocal calls
            calls += 1
            if calls == 9:
                file.write(b"half")
                raise error
            return write(file, name, weight)

        monkeypatch.setattr(shards, "_write", fail)
        with pytest.raises((AdaptcError, KeyboardInterrupt)):
            compiled.emit("hf", tmp_path / "merged", max_shard_size=SHARD)
        assert calls == 9
        assert contents() == before
    monkeypatch.undo()
    compiled.emit("hf", tmp_path / "merged", max_shard_size=SHARD)
    assert not (tmp_path / "merged/model.safetensors").exists()
    loaded_from(tmp_path / "merged", "bert")


@pytest.mark.parametrize("place", ["", "merged"])
def test_within_the_base(zoo: Zoo, place: str) -> None:
    base = zoo.directory("bert")
    entries = load({"emit": [{"format": "hf", "path": str(base / place)}]}).emit
    with pytest.raises(adaptc.SpecError, match="within the base's own directory"):
        emit_all(zoo.compiled("bert", []).program, entries)
