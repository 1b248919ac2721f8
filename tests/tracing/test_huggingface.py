"""The inputs and settings of Hugging Face models: read from the main input and the configuration, and said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import adaptc
from adaptc.compiler.base import make_base
from adaptc.errors import SpecError
from adaptc.ir.base import Base
from adaptc.ir.example_inputs import example_tensors
from adaptc.ir.module import bind
from adaptc.spec.spec import load
from adaptc.tracing.trace import trace_base as trace
from tests.families import close, outputs, randomise
from tests.hugging_face import DECODER, ENCODER_DECODER, MODELS, TEXT, Model

IDS = "int64[batch, seq]"
FRAMES = Model(
    "Speech2TextConfig",
    "speech-seq2seq",
    {
        **{
            "d_model": 16,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_ffn_dim": 8,
            "decoder_ffn_dim": 8,
        },
        **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 32, "conv_channels": 16},
        **{"input_feat_per_channel": 12, "max_source_positions": 64, "max_target_positions": 32},
    },
)
WAVEFORM = Model(
    "Wav2Vec2Config",
    "ctc",
    {
        "vocab_size": 20,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "conv_dim": (8, 8),
        "conv_kernel": (4, 3),
        "conv_stride": (2, 2),
        "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
    },
)
SPECTROGRAM = Model(
    "ASTConfig",
    "audio-classification",
    {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "max_length": 20,
        "num_mel_bins": 16,
        "patch_size": 4,
        "frequency_stride": 4,
        "time_stride": 4,
    },
)
RECTANGLE = Model("ViTConfig", "image-classification", MODELS["vit"].options | {"image_size": [16, 24]})
TAGGER = Model("T5Config", "token-classification", MODELS["t5"].options | {"num_labels": 3})
UNTYPED = Model("DebertaV2Config", "masked-lm", TEXT | {"pooler_hidden_size": 32})
"""Its tokenizer gives token types, and its configuration has no table of them."""
PAGE = Model("LayoutLMConfig", "token-classification", TEXT)
UNKNOWN = Model(
    "PerceiverConfig",
    "masked-lm",
    {
        "d_model": 16,
        "d_latents": 16,
        "num_latents": 4,
        "num_blocks": 1,
        "num_self_attends_per_block": 1,
        "vocab_size": 32,
    },
)


def base_of(model: Model, path: Path, **more: Any) -> Base:
    path.mkdir(exist_ok=True)
    built = model.build()
    built.config.architectures = [type(built).__name__]
    built.config.save_pretrained(path)  # type: ignore[operator]
    inputs = more.pop("inputs", {})
    return make_base(load({"base": {"model": str(path), "task": model.task, **more}, "inputs": inputs}))


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (
            MODELS["t5"],
            {"input_ids": IDS, "attention_mask": IDS, "decoder_input_ids": "int64[batch, decoder_seq]"},
        ),
        (TAGGER, {"input_ids": IDS, "attention_mask": IDS}),
        (MODELS["bert"], {"input_ids": IDS, "attention_mask": IDS, "token_type_ids": IDS}),
        (MODELS["roberta"], {"input_ids": IDS, "attention_mask": IDS}),
        (MODELS["gpt2"], {"input_ids": IDS, "attention_mask": IDS, "position_ids": IDS}),
        (UNTYPED, {"input_ids": IDS, "attention_mask": IDS}),
        (
            PAGE,
            {
                "input_ids": IDS,
                "attention_mask": IDS,
                "token_type_ids": IDS,
                "bbox": "int64[batch, seq, 4]",
            },
        ),
        (MODELS["vit"], {"pixel_values": "float32[batch, 3, 24, 24]"}),
        (RECTANGLE, {"pixel_values": "float32[batch, 3, 16, 24]"}),
        (MODELS["resnet"], {"pixel_values": "float32[batch, 3, height, width]"}),
        (
            MODELS["whisper"],
            {"input_features": "float32[batch, 8, 24]", "decoder_input_ids": "int64[batch, decoder_seq]"},
        ),
        (
            FRAMES,
            {
                "input_features": "float32[batch, frames, 12]",
                "decoder_input_ids": "int64[batch, decoder_seq]",
            },
        ),
        (WAVEFORM, {"input_values": "float32[batch, samples]"}),
        (SPECTROGRAM, {"input_values": "float32[batch, 20, 16]"}),
    ],
    ids=lambda value: value.config + "-" + value.task if isinstance(value, Model) else "",
)
def test_inputs_follow_from_the_configuration(model: Model, inputs: dict[str, str], tmp_path: Path) -> None:
    assert {spec.name: str(spec) for spec in base_of(model, tmp_path).inputs} == inputs


WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c")


def tokenizer_of(path: Path, **options: Any) -> None:
    """A tokenizer of a few words, saved beside a model."""
    import transformers

    path.mkdir(exist_ok=True)
    (path / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizer(str(path / "vocab.txt"), **options).save_pretrained(path)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, ["input_ids", "attention_mask", "token_type_ids"]),
        ({"model_input_names": ["input_ids", "attention_mask"]}, ["input_ids", "attention_mask"]),
        ({"model_input_names": ["input_ids"]}, ["input_ids"]),
        (
            {"model_input_names": ["input_ids", "position_ids", "token_type_ids"]},
            ["input_ids", "token_type_ids", "position_ids"],
        ),
    ],
    ids=lambda value: (
        "-".join(value.get("model_input_names", ["default"])) if isinstance(value, dict) else ""
    ),
)
def test_a_tokenizer_says_what_is_an_input(options: dict[str, Any], names: list[str], tmp_path: Path) -> None:
    tokenizer_of(tmp_path, **options)
    assert [spec.name for spec in base_of(MODELS["bert"], tmp_path).inputs] == names


def test_a_tokenizer_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{")
    base = base_of(MODELS["bert"], tmp_path)
    assert [spec.name for spec in base.inputs] == ["input_ids", "attention_mask", "token_type_ids"]
    assert any(note.startswith("its tokenizer cannot be read, so the configuration") for note in base.notes)


@pytest.mark.parametrize(
    ("model", "left_out"),
    [
        (MODELS["bert"], {"position_ids": "0..n-1, as the model counts them"}),
        (
            MODELS["roberta"],
            {"token_type_ids": "zeros", "position_ids": "0..n-1, as the model counts them"},
        ),
        (MODELS["llama"], {}),
        (MODELS["t5"], {"decoder_attention_mask": "ones"}),
        (WAVEFORM, {"attention_mask": "ones"}),
        (MODELS["vit"], {"attention_mask": "ones"}),
    ],
    ids=lambda value: value.config if isinstance(value, Model) else "",
)
def test_what_stands_for_an_input_that_is_left_out_is_said(
    model: Model, left_out: dict[str, str], tmp_path: Path
) -> None:
    assert dict(base_of(model, tmp_path).left_out) == left_out


def test_an_input_that_the_spec_takes_in_is_not_left_out(tmp_path: Path) -> None:
    base = base_of(MODELS["bert"], tmp_path, inputs={"input_ids": IDS, "position_ids": IDS})
    assert dict(base.left_out) == {"attention_mask": "ones", "token_type_ids": "zeros"}
    high = {spec.name: spec.high for spec in trace(base).inputs}
    assert high == {"input_ids": TEXT["vocab_size"], "position_ids": TEXT["max_position_embeddings"]}


def test_random_boxes_have_their_corners_in_order(tmp_path: Path) -> None:
    (bbox,) = [spec for spec in base_of(PAGE, tmp_path).inputs if spec.name == "bbox"]
    boxes = example_tensors([bbox], {"batch": 50, "seq": 40})["bbox"]
    left, top, right, bottom = boxes.unbind(-1)
    assert boxes.dtype == torch.int64
    assert (left <= right).all()
    assert (top <= bottom).all()
    assert boxes.min() >= 0
    assert 900 < boxes.max() <= 1000


def test_inputs_have_the_dtype_of_the_base(tmp_path: Path) -> None:
    (spec,) = base_of(MODELS["vit"], tmp_path, dtype="bfloat16").inputs
    assert spec.dtype == "bfloat16"


def test_inputs_of_the_spec_stay(tmp_path: Path) -> None:
    base = base_of(MODELS["resnet"], tmp_path, inputs={"pixel_values": "float32[n, 3, 32, 32]"})
    assert [str(spec) for spec in base.inputs] == ["float32[n, 3, 32, 32]"]


def test_inputs_that_cannot_be_derived_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"PerceiverForMaskedLM cannot be derived(.|\n)*inputs: float"):
        base_of(UNKNOWN, tmp_path)


@pytest.mark.parametrize("name", ["roberta", "resnet", "vit", "bert"])
def test_the_head_of_a_classifier_is_all_of_it(name: str, tmp_path: Path) -> None:
    base = base_of(MODELS[name], tmp_path)
    assert base.model is not None
    linear = {
        n for n, m in base.model.named_modules() if isinstance(m, torch.nn.Linear) and "classifier" in n
    }
    assert linear
    assert linear <= base.heads
    assert all(head.startswith("classifier") for head in base.heads)


@pytest.mark.parametrize(
    ("model", "notes"),
    [
        (
            Model(
                "BartConfig",
                "seq2seq-lm",
                ENCODER_DECODER | {"encoder_layerdrop": 0.5, "decoder_layerdrop": 0.5},
            ),
            [
                "encoder_layerdrop is set to 0.0: a graph has a fixed number of layers",
                "decoder_layerdrop is set to 0.0: a graph has a fixed number of layers",
            ],
        ),
        (
            WAVEFORM,
            [
                "layerdrop is set to 0.0: a graph has a fixed number of layers",
                "apply_spec_augment is set to False: its masks are drawn in Python, outside of the graph",
            ],
        ),
        (Model("LlamaConfig", "causal-lm", TEXT), []),
    ],
    ids=lambda value: value.config if isinstance(value, Model) else "",
)
def test_what_a_graph_cannot_follow_is_set_and_said(model: Model, notes: list[str], tmp_path: Path) -> None:
    assert base_of(model, tmp_path).notes == notes


@pytest.mark.parametrize("asked", [None, "eager", "batched_mm"])
def test_the_way_of_the_experts_is_said(asked: str | None, tmp_path: Path) -> None:
    more = {"config": {"experts_implementation": asked}} if asked else {}
    base = base_of(MODELS["mixtral"], tmp_path, **more)
    chosen = "batched_mm" if asked == "batched_mm" else "grouped_mm"
    assert base.model is not None
    assert base.model.config._experts_implementation == chosen  # type: ignore[union-attr]
    assert any(note.startswith(f"experts_implementation is {chosen}") for note in base.notes)
    replaced = [note for note in base.notes if note.startswith("experts_implementation is set to")]
    assert bool(replaced) == (asked == "eager")
    assert all("only the data tells" in note for note in replaced)


@pytest.mark.slow
def test_a_model_of_waveforms_is_the_eager_one_in_both_modes(tmp_path: Path) -> None:
    """Its layer drop and its masks of the spectrum are off; its weight norm and group norm are not."""
    eager = randomise(WAVEFORM.build(apply_spec_augment=False, layerdrop=0.0))
    eager.save_pretrained(tmp_path)  # type: ignore[operator]
    spec = {
        "base": {"model": str(tmp_path), "task": "ctc"},
        "adapt": [{"method": "lora", "target": "*_proj", "r": 2}],
    }
    compiled = adaptc.compile(spec)
    for batch, samples in ((2, 80), (1, 33)):
        tensors = {"input_values": torch.randn(batch, samples)}
        for training in (False, True):
            torch.manual_seed(3)
            want = eager.train(training)(**tensors)["logits"]
            torch.manual_seed(3)
            close(compiled.module.train(training)(**tensors)["logits"], want, 8)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_experts_compute_the_same_in_every_way(implementation: str, tmp_path: Path) -> None:
    eager = randomise(MODELS["mixtral"].build())
    eager.save_pretrained(tmp_path)  # type: ignore[operator]
    eager.set_experts_implementation(implementation)  # type: ignore[operator]
    for traced in ("grouped_mm", "batched_mm"):
        base = {"model": str(tmp_path), "task": "causal-lm", "config": {"experts_implementation": traced}}
        graph = trace(make_base(load({"base": base})))
        module = bind(graph).eval()
        for batch, length in ((2, 7), (1, 1), (3, 9)):
            ids = torch.randint(0, DECODER["vocab_size"], (batch, length))
            tensors = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            with torch.no_grad():
                want = outputs(eager.eval(), tensors, ["logits"], use_cache=False)
                close(module(**tensors)["logits"], want["logits"])
