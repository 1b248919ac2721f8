"""Images in a text: traced as an input, and computed in ONNX Runtime as PEFT does."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import adaptc
from adaptc.cli.starter import starter_spec
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
MISTRAL = LANGUAGE | {"model_type": "mistral"}
PIXTRAL = VISION | {"model_type": "pixtral", "image_size": 32, "patch_size": 4, "head_dim": 8}
PERCEIVER = {
    "hidden_size": 32,
    "resampler_n_latents": 4,
    "resampler_depth": 1,
    "resampler_n_heads": 4,
    "resampler_head_dim": 8,
    "num_key_value_heads": 2,
}
POINTS = [[16, 32], [32, 16]]
TILED = VISION | {
    "patch_size": 4,
    "vision_output_dim": 16,
    "projector_input_dim": 16,
    "projector_output_dim": 16,
    "pixel_shuffle_ratio": 0.5,
}
LLAMA4 = LANGUAGE | {"intermediate_size_mlp": 48, "num_local_experts": 2, "num_experts_per_tok": 1}
GRID = {
    "depth": 2,
    "hidden_size": 32,
    "out_hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "mlp_ratio": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
TURNED = DECODER | {
    "num_hidden_layers": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
}
TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": 1,
    "vision_start_token_id": 2,
    "vision_end_token_id": 2,
}


class Pictures(NamedTuple):
    """Texts with images, as what is compiled takes them, and as the model itself does."""

    given: dict[str, torch.Tensor]
    own: dict[str, torch.Tensor]


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
    "llama4": _model("Llama4Config", TILED, LLAMA4, image_token_index=IMAGE),
    "qwen2-vl": _model("Qwen2VLConfig", GRID | {"embed_dim": 32}, TURNED, **TOKENS),
    "qwen2.5-vl": _model(
        "Qwen2_5_VLConfig", GRID | {"window_size": 16, "fullatt_block_indexes": [1]}, TURNED, **TOKENS
    ),
    "qwen3-vl": _model(
        "Qwen3VLConfig",
        GRID | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        TURNED | {"head_dim": 8},
        **TOKENS,
    ),
    "glm4v": _model("Glm4vConfig", GRID | {"image_size": 32}, TURNED, **TOKENS),
    "llava-next": _model(
        "LlavaNextConfig", CLIP, LLAMA, image_token_index=IMAGE, image_grid_pinpoints=POINTS
    ),
    "llava-onevision": _model(
        "LlavaOnevisionConfig", SIGLIP, QWEN2, image_token_index=IMAGE, image_grid_pinpoints=POINTS
    ),
    "llava-pixtral": _model(
        "LlavaConfig", PIXTRAL, LLAMA, image_token_index=IMAGE, vision_feature_select_strategy="full"
    ),
    "mistral3": _model("Mistral3Config", PIXTRAL, MISTRAL, image_token_index=IMAGE, spatial_merge_size=2),
    "idefics2": _model("Idefics2Config", VISION, MISTRAL, image_token_id=IMAGE, perceiver_config=PERCEIVER),
    "idefics3": _model("Idefics3Config", VISION, LLAMA, image_token_id=IMAGE, scale_factor=2),
    "smolvlm": _model("SmolVLMConfig", VISION, LLAMA, image_token_id=IMAGE, scale_factor=2),
}


def saved(model: Model, path: Path) -> Any:
    """A model with a PEFT adapter on its language model, its projector and its vision tower, saved."""
    torch.manual_seed(0)
    base: Any = randomise(model.build())
    base.save_pretrained(path / "base")
    target = r".*(\.v_proj|\.o_proj|\.qkv|linear_1|\.proj|\.mlp\.0)"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=target))
    perturb(adapted)
    adapted.save_pretrained(path / "adapter")
    return adapted.eval()


def a_picture_in_a_text(compiled: adaptc.Compiled, length: int, model: Any, batch: int) -> Pictures:
    """Texts with an image each, at another place than where the model was traced with it."""
    base = compiled.base.source
    (ids,) = [spec for spec in base.inputs if spec.name == "input_ids"]
    (pixels,) = [spec for spec in base.inputs if spec.name == "pixel_values"]
    assert ids.placeholders is not None
    token, count = ids.placeholders
    assert token == IMAGE
    batch = batch if ids.dims[0] == "batch" else 1
    tokens = torch.randint(3, IMAGE, (batch, length + count))
    tokens[:, length // 2 : length // 2 + count] = token
    marks = (tokens == token).long()
    given = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "token_type_ids": marks,
        "pixel_values": torch.randn([batch if size == "batch" else int(size) for size in pixels.dims]),
    }
    constants = {spec.name: torch.tensor(spec.constant) for spec in base.constants}
    taken = inspect.signature(model.forward).parameters
    own = given | {"mm_token_type_ids": marks} | constants
    if any(spec.name == "position_ids" for spec in base.inputs):
        (finder,) = [part for part in model.modules() if hasattr(part, "get_rope_index")]
        given["position_ids"] = finder.get_rope_index(tokens, mm_token_type_ids=marks, **constants)[0]
    return Pictures(
        {spec.name: given[spec.name] for spec in base.inputs},
        {name: tensor for name, tensor in own.items() if name in taken},
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [n if n == "llava" else pytest.param(n, marks=pytest.mark.slow) for n in MODELS]
)
def test_an_image_in_a_text_is_computed_as_peft_does(name: str, tmp_path: Path) -> None:
    adapted = saved(MODELS[name], tmp_path)
    model = adapted.get_base_model()
    base = {"model": str(tmp_path / "base"), "task": "image-text-to-text"}
    compiled = adaptc.compile({"base": base, "adapt": [{"adapter": str(tmp_path / "adapter")}]})
    compiled.emit("onnx", tmp_path / "model.onnx")
    program = onnx_runner(tmp_path / "model.onnx")
    assert {"input_ids", "attention_mask", "pixel_values"} <= {spec.name for spec in compiled.base.inputs}
    adapted_layers = [site.name for entry in compiled.plan.entries for site in entry.selection.sites]
    assert {"vis" in layer for layer in adapted_layers} == {True, False}
    for batch, length in ((2, 6), (1, 1)):
        pictures = a_picture_in_a_text(compiled, length, model, batch)
        with torch.no_grad():
            want = adapted(**pictures.own, use_cache=False).logits
            inverted = pictures.own | {"pixel_values": -pictures.own["pixel_values"]}
            other = adapted(**inverted, use_cache=False).logits
        close(program(pictures.given)[compiled.base.outputs.index("logits")], want)
        close(compiled.module.eval()(**pictures.given)["logits"], want)
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


def test_a_model_that_cannot_be_traced_with_images_is_told_with_the_reason(tmp_path: Path) -> None:
    vision = VISION | {"model_type": "clip_vision_model", "patch_size": 5}
    aria = _model("AriaConfig", vision, LANGUAGE | {"model_type": "aria_text"}, image_token_index=IMAGE)
    base = base_of(aria, tmp_path)
    assert [spec.name for spec in base.inputs] == ["input_ids", "attention_mask"]
    told = "none, text only (AriaForConditionalGeneration cannot be traced with it: "
    assert base.left_out["pixel_values"].startswith(told)
    assert "patch_to_query_dict" in base.left_out["pixel_values"]


def test_sizes_of_images_are_constants_that_a_spec_may_state(tmp_path: Path) -> None:
    base = base_of(MODELS["llava-next"], tmp_path / "derived")
    assert {spec.name: str(spec) for spec in (*base.inputs, *base.constants)} == {
        "input_ids": "int64[1, seq]",
        "attention_mask": "int64[1, seq]",
        "pixel_values": "float32[1, 3, 3, 16, 16]",
        "image_sizes": "[[16, 32]]",
    }
    assert any(note.startswith("image_sizes is [[16, 32]] in every product") for note in base.notes)
    assert "#   image_sizes: [[16, 32]]\n" in starter_spec(tmp_path / "derived", None, tmp_path).text
    stated = {
        "input_ids": "int64[3, seq]",
        "pixel_values": "float32[2, 3, 3, 16, 16]",
        "image_sizes": [[16, 32], [16, 32]],
    }
    with pytest.raises(
        SpecError, match=r"3 texts cannot share 28 tokens of images(.|\n)*take it out of `inputs`"
    ):
        base_of(MODELS["llava-next"], tmp_path / "uneven", inputs=stated)
    open_batch = stated | {"input_ids": "int64[batch, seq]"}
    with pytest.raises(SpecError, match=r"number of images is fixed(.|\n)*a number in place of `batch`"):
        base_of(MODELS["llava-next"], tmp_path / "open", inputs=open_batch)


def test_images_that_a_spec_asks_for_and_cannot_have_are_an_error(tmp_path: Path) -> None:
    asked = {"input_ids": "int64[1, seq]", "pixel_values": "float32[1, 3, 3, 16, 16]"}
    with pytest.raises(SpecError, match=r"LlavaNext\w+ can be traced with: (.|\n)*take it out"):
        base_of(MODELS["llava-next"], tmp_path, inputs=asked)
