"""Images in a text: traced as an input, and computed in ONNX Runtime as PEFT does."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import adaptc
from adaptc.compiler.base import make_base
from adaptc.emit.onnx.runtime import onnx_runner
from adaptc.errors import SpecError
from adaptc.ir.base import Base
from adaptc.spec.spec import load
from adaptc.tracing.trace import trace_base
from tests.families import close, differs, perturb, randomise
from tests.hugging_face import DECODER, HEADS, VOCABULARY, Model

peft = pytest.importorskip("peft")
IMAGE = VOCABULARY - 1
"""The token that holds the place of an image's features."""
LANGUAGE = DECODER | HEADS | {"num_hidden_layers": 1}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
CLIP = VISION | {"model_type": "clip_vision_model"}
SIGLIP = VISION | {"model_type": "siglip_vision_model"}
LLAMA, QWEN2, GEMMA = ({**LANGUAGE, "model_type": name} for name in ("llama", "qwen2", "gemma"))
COHERE = LANGUAGE | {"model_type": "cohere2"}


def _model(config: str, vision: dict[str, Any], text: dict[str, Any], **more: Any) -> Model:
    return Model(config, "image-text-to-text", {"vision_config": vision, "text_config": text, **more})


MODELS = {
    "llava": _model("LlavaConfig", CLIP, LLAMA, image_token_index=IMAGE),
    "llava-siglip": _model(
        "LlavaConfig", SIGLIP, QWEN2, image_token_index=IMAGE, vision_feature_select_strategy="full"
    ),
    "vipllava": _model(
        "VipLlavaConfig", CLIP, LLAMA, image_token_index=IMAGE, vision_feature_layers=[-1, -2]
    ),
    "gemma3": _model(
        "Gemma3Config", SIGLIP | {"image_size": 32}, LANGUAGE, image_token_index=IMAGE, mm_tokens_per_image=4
    ),
    "paligemma": _model(
        "PaliGemmaConfig", SIGLIP | {"projection_dim": 32}, GEMMA, image_token_index=IMAGE, projection_dim=32
    ),
    "internvl": _model(
        "InternVLConfig",
        VISION | {"image_size": [16, 16], "patch_size": [4, 4]},
        QWEN2,
        image_token_id=IMAGE,
    ),
    "aya": _model("AyaVisionConfig", SIGLIP | {"image_size": 32}, COHERE, image_token_index=IMAGE),
    "cohere2": _model("Cohere2VisionConfig", SIGLIP | {"image_size": 32}, COHERE, image_token_id=IMAGE),
}


def saved(model: Model, path: Path) -> Any:
    """A model with a PEFT adapter on its language model, its projector and its vision tower, saved."""
    torch.manual_seed(0)
    base: Any = randomise(model.build())
    base.save_pretrained(path / "base")
    target = r".*(\.v_proj|\.o_proj|linear_1)"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=target))
    perturb(adapted)
    adapted.save_pretrained(path / "adapter")
    return adapted.eval()


def a_picture_in_a_text(compiled: adaptc.Compiled, batch: int, length: int) -> dict[str, torch.Tensor]:
    """Texts with an image each, at another place than where the model was traced with it."""
    (ids,) = [spec for spec in compiled.base.inputs if spec.name == "input_ids"]
    (pixels,) = [spec for spec in compiled.base.inputs if spec.name == "pixel_values"]
    assert ids.placeholders is not None
    token, count = ids.placeholders
    assert token == IMAGE
    tokens = torch.randint(3, IMAGE, (batch, length + count))
    tokens[:, length // 2 : length // 2 + count] = token
    tensors = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "token_type_ids": (tokens == token).long(),
        "pixel_values": torch.randn(batch, *(int(size) for size in pixels.dims[1:])),
    }
    return {spec.name: tensors[spec.name] for spec in compiled.base.inputs}


@pytest.mark.parametrize(
    "name", [n if n == "llava" else pytest.param(n, marks=pytest.mark.slow) for n in MODELS]
)
def test_an_image_in_a_text_is_computed_as_peft_does(name: str, tmp_path: Path) -> None:
    adapted = saved(MODELS[name], tmp_path)
    base = {"model": str(tmp_path / "base"), "task": "image-text-to-text"}
    compiled = adaptc.compile({"base": base, "adapt": [{"adapter": str(tmp_path / "adapter")}]})
    compiled.emit("onnx", tmp_path / "model.onnx")
    program = onnx_runner(tmp_path / "model.onnx")
    marked = "token_type_ids" in inspect.signature(adapted.get_base_model().forward).parameters
    names = ["input_ids", "attention_mask", *["token_type_ids"] * marked, "pixel_values"]
    assert sorted(spec.name for spec in compiled.base.inputs) == sorted(names)
    for batch, length in ((2, 6), (1, 1)):
        tensors = a_picture_in_a_text(compiled, batch, length)
        with torch.no_grad():
            want = adapted(**tensors, use_cache=False).logits
            other = adapted(**tensors | {"pixel_values": -tensors["pixel_values"]}, use_cache=False).logits
        close(program(tensors)[0], want)
        close(compiled.module.eval()(**tensors)["logits"], want)
        differs(other, want)


def base_of(model: Model, path: Path, **more: Any) -> Base:
    """The base of a directory without weights."""
    built: Any = model.build()
    built.config.save_pretrained(path)
    return make_base(load({"base": {"model": str(path), "task": model.task}, **more}))


def test_a_spec_leaves_images_out(tmp_path: Path) -> None:
    tokens = dict.fromkeys(("input_ids", "attention_mask"), "int64[batch, seq]")
    base = base_of(MODELS["llava"], tmp_path, inputs=tokens)
    assert [spec.name for spec in trace_base(base).inputs] == ["input_ids", "attention_mask"]
    assert base.left_out["pixel_values"] == "none, text only"


NEXT = _model(
    "LlavaNextConfig", CLIP, LLAMA, image_token_index=IMAGE, image_grid_pinpoints=[[16, 16], [16, 32]]
)
"""Its images are cut into as many tiles as their sizes need, which are another input."""


def test_a_model_that_cannot_be_traced_with_images_is_told_with_the_reason(tmp_path: Path) -> None:
    base = base_of(NEXT, tmp_path)
    assert [spec.name for spec in base.inputs] == ["input_ids", "attention_mask"]
    told = "none, text only (LlavaNextForConditionalGeneration cannot be traced with it: "
    assert base.left_out["pixel_values"].startswith(told)
    assert "image_sizes" in base.left_out["pixel_values"]


def test_images_that_a_spec_asks_for_and_cannot_have_are_an_error(tmp_path: Path) -> None:
    asked = {"input_ids": "int64[batch, seq]", "pixel_values": "float32[batch, 3, 16, 16]"}
    with pytest.raises(SpecError, match=r"LlavaNext\w+ can be traced with: .*image_sizes(.|\n)*take it out"):
        base_of(NEXT, tmp_path, inputs=asked)
