"""Adapters whose names are those of transformers 4, on every kind of change of names that transformers has made.

`save_pretrained` still writes a model's weights by their names of old. So the right outputs are those of the model
whose files have each adapter added, by these names.
"""

from __future__ import annotations

import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import adaptc
from adaptc.errors import AdaptcError
from adaptc.optional import MissingPackageError
from adaptc.tracing.huggingface.tasks import tasks
from tests.families import close, differs, randomise
from tests.hugging_face import DECODER, MODELS, TEXT, Model

pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
IMAGES: dict[str, Any] = MODELS["vit"].options
VISION: dict[str, Any] = {
    **{"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1},
    **{"num_attention_heads": 4, "image_size": 16, "patch_size": 8},
}
WORDS: dict[str, Any] = DECODER | {"model_type": "llama", "num_hidden_layers": 1}
ROUTED: dict[str, Any] = DECODER | {"num_hidden_layers": 1, "num_experts_per_tok": 2}
SMALL_EXPERTS: dict[str, Any] = ROUTED | {"num_experts": 3, "moe_intermediate_size": 24}
FAMILIES: dict[str, tuple[Model, str | list[str]]] = {
    "llava": (
        Model(
            "LlavaConfig",
            "image-text-to-text",
            {"vision_config": VISION, "text_config": WORDS, "image_token_index": 98, "image_seq_length": 4},
        ),
        r"language_model\.model\..*\.(q_proj|v_proj)",
    ),
    "vit": (MODELS["vit"], ["query", "attention.output.dense"]),
    "dinov2": (Model("Dinov2Config", "image-classification", IMAGES), ["query", "value", "dense"]),
    "swin": (
        Model(
            "SwinConfig",
            "image-classification",
            {
                **{"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1]},
                **{"num_heads": [2, 2], "window_size": 4, "num_labels": 3},
            },
        ),
        ["query", "output.dense"],
    ),
    "segformer": (
        Model(
            "SegformerConfig",
            "image-classification",
            {
                **{"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16]},
                **{"patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [1, 2]},
                **{"mlp_ratios": [2, 2], "decoder_hidden_size": 16, "num_labels": 3},
            },
        ),
        r".*encoder\.block\..*(query|dense1)",
    ),
    "gpt-neox": (Model("GPTNeoXConfig", "causal-lm", TEXT), ["query_key_value", "embed_out"]),
    "mixtral": (
        Model("MixtralConfig", "causal-lm", ROUTED | {"num_local_experts": 3}),
        ["q_proj", "w1", "w2", "w3"],
    ),
    "mixtral-down": (Model("MixtralConfig", "causal-lm", ROUTED | {"num_local_experts": 3}), ["w2"]),
    "mixtral-up": (Model("MixtralConfig", "causal-lm", ROUTED | {"num_local_experts": 3}), ["w1", "w3"]),
    "qwen2-moe": (
        Model(
            "Qwen2MoeConfig",
            "causal-lm",
            SMALL_EXPERTS | {"shared_expert_intermediate_size": 40, "decoder_sparse_step": 1},
        ),
        ["k_proj", "gate_proj", "up_proj", "down_proj"],
    ),
    "qwen3-moe": (
        Model("Qwen3MoeConfig", "causal-lm", SMALL_EXPERTS | {"head_dim": 8, "decoder_sparse_step": 1}),
        r".*\.(v_proj|mlp\.experts\.\d+\.(gate|up|down)_proj)",
    ),
    "olmoe": (
        Model("OlmoeConfig", "causal-lm", ROUTED | {"num_experts": 3}),
        ["gate_proj", "up_proj", "down_proj", "gate"],
    ),
}
QUICK = ("mixtral",)
PEFT_CONVERTS = {"llava": r".*language_model.*\.(q_proj|v_proj)", "mixtral": None, "olmoe": None}
"""Families that PEFT converts too -> the target that both read, where PEFT cannot read that of `FAMILIES`."""


def each(names: Any) -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in names]


def base_of(name: str, directory: Path) -> Path:
    randomise(FAMILIES[name][0].build()).save_pretrained(directory)
    return directory


def model_at(name: str, directory: Path) -> Any:
    import transformers

    auto = getattr(transformers, tasks()[FAMILIES[name][0].task])
    return auto.from_pretrained(directory).eval()


def inputs_of(name: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    if FAMILIES[name][0].task == "image-classification":
        size = FAMILIES[name][0].options.get("image_size", 32)
        return {"pixel_values": torch.randn(2, 3, size, size, generator=generator)}
    ids = torch.randint(4, 60, (2, 9), generator=generator)
    if name != "llava":
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    ids[:, 1:5] = 98
    pixels = torch.randn(2, 3, 16, 16, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def targeted(module: str, target: str | list[str]) -> bool:
    if isinstance(target, str):
        return re.fullmatch(target, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in target)


def adapter_of(name: str, base: Path, adapter: Path, **config: Any) -> Path:
    """Write an adapter by the names of old, and give the base's files with it added."""
    state, target = load_file(base / "model.safetensors"), FAMILIES[name][1]
    modules = [key.removesuffix(".weight") for key in state if key.endswith(".weight")]
    factors: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(1)
    stated: dict[str, Any] = {"r": 3, "lora_alpha": 5} | config
    for module in modules:
        if targeted(module, target):
            weight = state[f"{module}.weight"]
            A = torch.randn(3, weight.shape[1], generator=generator) * 0.3
            B = torch.randn(weight.shape[0], 3, generator=generator) * 0.3
            factors[f"base_model.model.{module}.lora_A.weight"] = A
            factors[f"base_model.model.{module}.lora_B.weight"] = B
            scale = stated["lora_alpha"] / (3**0.5 if stated.get("use_rslora") else 3)
            state[f"{module}.weight"] = weight + scale * B @ A
    assert factors
    adapter.mkdir()
    save_file(factors, adapter / "adapter_model.safetensors")
    stated |= {"peft_type": "LORA", "target_modules": target}
    (adapter / "adapter_config.json").write_text(json.dumps(stated))
    merged = adapter.parent / f"{adapter.name}-merged"
    shutil.copytree(base, merged)
    save_file(state, merged / "model.safetensors", {"format": "pt"})
    return merged


def run(model: Any, name: str) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs_of(name))["logits"]


def compiled(name: str, base: Path, adapter: Path) -> adaptc.Compiled:
    task = FAMILIES[name][0].task
    spec = {"base": {"model": str(base), "task": task}, "adapt": [{"adapter": str(adapter)}]}
    return adaptc.compile(spec)


@pytest.mark.parametrize("name", each(FAMILIES))
def test_names_of_transformers_4(name: str, tmp_path: Path) -> None:
    base = base_of(name, tmp_path / "base")
    merged = adapter_of(name, base, tmp_path / "adapter", lora_dropout=0.05)
    want = run(model_at(name, merged), name)
    differs(want, run(model_at(name, base), name))
    result = compiled(name, base, tmp_path / "adapter")
    close(run(result.module, name), want)
    close(run(result.fold(), name), want)
    assert any("this transformers" in note or "earlier transformers" in note for note in result.plan.notes)


@pytest.mark.slow
@pytest.mark.parametrize("name", each(["vit", "llava", "gpt-neox", "mixtral", "olmoe"]))
def test_an_adapter_that_is_loaded_later(name: str, tmp_path: Path) -> None:
    """`load_adapter` reads the same names and says so, with what is compiled and with the module alone, written too."""
    base = base_of(name, tmp_path / "base")
    merged = adapter_of(name, base, tmp_path / "adapter")
    result = compiled(name, base, tmp_path / "adapter")
    want = run(model_at(name, merged), name)
    result.emit("torch", tmp_path / "module")
    alone = adaptc.load(tmp_path / "module")
    loaders = {result.module: result.load_adapter, alone: partial(adaptc.load_adapter, alone)}
    for module, load_adapter in loaders.items():
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.25)
        differs(run(module, name), want)
        with pytest.warns(UserWarning, match="this transformers|earlier transformers"):
            load_adapter(tmp_path / "adapter")
        close(run(module, name), want)


@pytest.mark.slow
@pytest.mark.parametrize("name", PEFT_CONVERTS)
def test_as_peft_reads_them(name: str, tmp_path: Path) -> None:
    from peft import PeftModel

    base = base_of(name, tmp_path / "base")
    adapter_of(name, base, tmp_path / "adapter")
    changed(tmp_path / "adapter", target_modules=PEFT_CONVERTS[name] or FAMILIES[name][1])
    peft = PeftModel.from_pretrained(model_at(name, base), tmp_path / "adapter")
    close(run(compiled(name, base, tmp_path / "adapter").module, name), run(peft, name))


@pytest.mark.slow
def test_scale_of_rslora(tmp_path: Path) -> None:
    base = base_of("mixtral", tmp_path / "base")
    merged = adapter_of("mixtral", base, tmp_path / "adapter", use_rslora=True)
    want = run(model_at("mixtral", merged), "mixtral")
    close(run(compiled("mixtral", base, tmp_path / "adapter").module, "mixtral"), want)


def changed(adapter: Path, **config: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


def refused(name: str, base: Path, adapter: Path) -> str:
    with pytest.raises(AdaptcError) as caught:
        compiled(name, base, adapter)
    return str(caught.value)


@pytest.mark.slow
def test_patterns_and_other_methods_by_old_names(tmp_path: Path) -> None:
    """What a configuration says of one layer by its name of old, and modules that are trained whole."""
    base, adapter = base_of("gpt-neox", tmp_path / "base"), tmp_path / "adapter"
    merged = adapter_of("gpt-neox", base, adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    head = "base_model.model.embed_out"
    A, B = (tensors.pop(f"{head}.lora_{factor}.weight") for factor in "AB")
    whole = load_file(merged / "model.safetensors")["embed_out.weight"]
    save_file({**tensors, f"{head}.weight": whole}, adapter / "adapter_model.safetensors")
    changed(adapter, target_modules=["query_key_value"], modules_to_save=["embed_out"])
    want = run(model_at("gpt-neox", merged), "gpt-neox")
    close(run(compiled("gpt-neox", base, adapter).module, "gpt-neox"), want)
    save_file(
        {**tensors, f"{head}.lora_A.weight": A[:2].clone(), f"{head}.lora_B.weight": B[:, :2].clone()},
        adapter / "adapter_model.safetensors",
    )
    changed(adapter, target_modules=["query_key_value", "embed_out"], modules_to_save=None)
    changed(adapter, rank_pattern={"embed_out": 2}, alpha_pattern={"embed_out": 4})
    state = load_file(merged / "model.safetensors")
    state["embed_out.weight"] = (
        load_file(base / "model.safetensors")["embed_out.weight"] + 2 * B[:, :2] @ A[:2]
    )
    save_file(state, merged / "model.safetensors", {"format": "pt"})
    want = run(model_at("gpt-neox", merged), "gpt-neox")
    close(run(compiled("gpt-neox", base, adapter).module, "gpt-neox"), want)


def test_parts_of_a_tensor_that_no_adapter_of_it_equals(tmp_path: Path) -> None:
    base, adapter = base_of("mixtral", tmp_path / "base"), tmp_path / "adapter"
    adapter_of("mixtral", base, adapter)
    changed(adapter, alpha_pattern={"w1": 7})
    message = refused("mixtral", base, adapter)
    assert "which this transformers holds as a part of model.layers.0.mlp.experts.gate_up_proj" in message
    assert "no adapter of that tensor is the same" in message
    assert "merge it into its base with the transformers that it was trained with" in message
    changed(adapter, alpha_pattern={})
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {key: tensor for key, tensor in tensors.items() if ".w3." not in key},
        adapter / "adapter_model.safetensors",
    )
    assert "no adapter of that tensor is the same" in refused("mixtral", base, adapter)


@pytest.mark.slow
def test_without_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are transformers' own; only tensors that are put together need PEFT."""
    from adaptc.checkpoints import experts

    def missing(module: str) -> Any:
        raise MissingPackageError(f"this needs {module}, which is not installed", f"pip install '{module}'")

    monkeypatch.setattr(experts, "optional", missing)
    base = base_of("mixtral", tmp_path / "base")
    adapter_of("mixtral", base, tmp_path / "adapter")
    message = refused("mixtral", base, tmp_path / "adapter")
    assert "PEFT can put them together: this needs peft, which is not installed" in message
    assert "pip install 'peft'" in message
    base = base_of("vit", tmp_path / "vit")
    merged = adapter_of("vit", base, tmp_path / "vit-adapter")
    want = run(model_at("vit", merged), "vit")
    close(run(compiled("vit", base, tmp_path / "vit-adapter").module, "vit"), want)
