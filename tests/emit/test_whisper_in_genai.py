"""Whisper in a directory of onnxruntime-genai: its encoder is run once for a recording, and its tokens are PEFT's."""

from __future__ import annotations

import json
import wave
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import adaptc
from adaptc.cli.inspection import inspect, verify
from adaptc.compiler.artifacts.emit import emit_all
from adaptc.compiler.driver import plan
from adaptc.generation.genai import GenaiModel
from tests.families import Zoo
from tests.hugging_face import MODELS
from tests.served import save_tokenizer

MELS, START, NEW = 8, 2, 20
INT4: dict[str, Any] = {
    "quantize": [{"method": "int4", "target": "all-linear", "block_size": 16}],
    "passes": ["insert", "fold", "quantize"],
}


@dataclass(frozen=True)
class Whisper:
    """A small Whisper of 3000 frames whose encoder has one layer more than its decoder, with a LoRA by PEFT."""

    base: Path
    adapter: Path

    def merged(self) -> Any:
        """The model with the adapter in its weights, as PEFT merges it."""
        from peft import PeftModel
        from transformers import WhisperForConditionalGeneration

        model: Any = WhisperForConditionalGeneration.from_pretrained(self.base)
        return PeftModel.from_pretrained(model, str(self.adapter)).merge_and_unload().eval()

    def spec(self, **more: Any) -> dict[str, Any]:
        """A spec that folds the adapter."""
        base = {"model": str(self.base), "task": "speech-seq2seq"}
        return {"base": base, "adapt": [{"adapter": str(self.adapter)}], **more}


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Whisper:
    from peft import LoraConfig, get_peft_model
    from transformers import WhisperFeatureExtractor

    root = tmp_path_factory.mktemp("whisper")
    sizes = {"max_source_positions": 1500, "encoder_layers": 3, "decoder_layers": 2}
    ids = {"eos_token_id": 95, "decoder_start_token_id": START, "suppress_tokens": None}
    torch.manual_seed(0)
    model: Any = MODELS["whisper"].build(vocab_size=320, init_std=0.4, **sizes, **ids)
    model.save_pretrained(root / "base")
    save_tokenizer(root / "base", template=None)
    WhisperFeatureExtractor(feature_size=MELS).save_pretrained(root / "base")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj", "fc1"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(str(root / "lora"))
    return Whisper(root / "base", root / "lora")


@pytest.fixture(scope="module")
def served(whisper: Whisper, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[str, ...]]:
    directory = tmp_path_factory.mktemp("served") / "serve"
    spec = whisper.spec(emit=[{"format": "genai", "path": str(directory)}])
    compiled = adaptc.compile(spec)
    (artifact,) = emit_all(compiled.program, compiled.spec.emit)
    return directory, artifact.notes


def heard(count: int) -> torch.Tensor:
    return torch.randn(count, MELS, 3000, generator=torch.Generator().manual_seed(5))


def written_down(model: Any, sounds: torch.Tensor, prompt: list[int]) -> list[list[int]]:
    """The likeliest tokens of transformers' model, without a cache, for each recording."""
    answers: list[list[int]] = []
    for sound in sounds:
        ids = list(prompt)
        while len(ids) < len(prompt) + NEW and ids[-1] != 95:
            with torch.no_grad():
                logits = model(input_features=sound[None], decoder_input_ids=torch.tensor([ids])).logits
            ids.append(int(logits[0, -1].argmax()))
        answers.append(ids[len(prompt) :])
    return answers


@pytest.mark.slow
def test_tokens_are_those_of_peft(whisper: Whisper, served: tuple[Path, Any]) -> None:
    sounds, model = heard(3), GenaiModel(served[0])
    want = written_down(whisper.merged(), sounds, [START, 7, 9])
    assert len({tuple(answer) for answer in want}) == 3, "each recording has a text of its own"
    assert [model.greedy([[START, 7, 9]], NEW, sound[None])[0] for sound in sounds] == want
    assert model.greedy([[START, 7, 9]] * 3, NEW, sounds) == want
    base = written_down(type(whisper.merged()).from_pretrained(whisper.base).eval(), sounds, [START, 7, 9])
    assert base != want, "the adapter changes what is written"


@pytest.mark.slow
def test_the_directory_is_whole(served: tuple[Path, tuple[str, ...]]) -> None:
    directory, notes = served
    names = {path.name for path in directory.iterdir()}
    assert {"model.onnx", "model.onnx.data", "encoder.onnx", "encoder.onnx.data", "tokenizer.json"} <= names
    config = json.loads((directory / "genai_config.json").read_text())["model"]
    assert (config["type"], config["decoder_start_token_id"], config["context_length"]) == (
        "whisper",
        START,
        40,
    )
    assert config["encoder"]["filename"] == "encoder.onnx"
    assert config["encoder"]["inputs"] == {"audio_features": "input_features"}
    assert config["decoder"]["inputs"]["cross_past_key_names"] == "past_key_values.%d.cross.key"
    assert not any("feature extractor" in note for note in notes)


@pytest.mark.slow
def test_it_is_inspected_and_proved_again(served: tuple[Path, Any]) -> None:
    shown = {row["what"]: row["value"] for row in inspect(served[0])}
    assert shown["genai: context length"] == 40
    rows = verify(served[0])
    assert {"encoder.onnx", "encoder.onnx.data", "audio_processor_config.json"} <= {
        row["what"] for row in rows
    }
    assert "onnxruntime-genai generates the same tokens, one by one" in rows[-1]["checked"]


@pytest.mark.slow
def test_a_recording_becomes_features_as_in_transformers(served: tuple[Path, Any], tmp_path: Path) -> None:
    """The last frame differs: onnxruntime-genai mirrors a recording where it ends, and transformers fills it up."""
    from transformers import WhisperFeatureExtractor

    waves = (np.sin(np.arange(16000) * 0.05) * 9000 + np.random.RandomState(0).randn(16000) * 3000).astype(
        "<i2"
    )
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(waves.tobytes())
    model = GenaiModel(served[0])
    processor = model.model.create_multimodal_processor()
    inputs = processor(["<s>"], audios=model.package.Audios.open(str(tmp_path / "a.wav")))
    extractor = WhisperFeatureExtractor.from_pretrained(served[0])
    samples = waves.astype(np.float32) / 32768
    want = extractor(samples, sampling_rate=16000, return_tensors="np")["input_features"]
    got = inputs["audio_features"].as_numpy()
    assert got.shape == want.shape == (1, MELS, 3000)
    assert np.abs(got - want)[..., 2:98].max() < 1e-4
    generator = model.package.Generator(model.model, params(model))
    generator.set_inputs(inputs)
    generator.generate_next_token()
    assert len(generator.get_sequence(0)) == inputs["input_ids"].shape()[1] + 1


def params(model: GenaiModel) -> Any:
    options = model.package.GeneratorParams(model.model)
    options.set_search_options(max_length=12)
    return options


@pytest.mark.slow
def test_a_prompt_is_no_sound(served: tuple[Path, Any]) -> None:
    from adaptc.cli.generate_command import generate
    from adaptc.generation.settings import Settings

    with pytest.raises(adaptc.AdaptcError, match="writes down what it hears, and a prompt is no sound"):
        generate(served[0], "to be", Settings(), None, (), None, print)


@pytest.mark.slow
@pytest.mark.parametrize("more", [INT4, {"dtype": "float16"}], ids=["int4", "float16"])
def test_few_bits(whisper: Whisper, tmp_path: Path, more: dict[str, Any]) -> None:
    """The tokens are proved as they are made; the encoder has few bits too."""
    spec = whisper.spec(**{name: value for name, value in more.items() if name != "dtype"})
    spec["base"] |= {"dtype": more["dtype"]} if "dtype" in more else {}
    compiled = adaptc.compile(spec)
    compiled.emit("genai", tmp_path / "serve")
    assert "genai, greedy, one by one" in {proof.name for proof in compiled.proofs}
    assert "generates the same tokens" in verify(tmp_path / "serve")[-1]["checked"]


@pytest.mark.slow
def test_other_numbers_of_frames_are_refused(zoo: Zoo, tmp_path: Path) -> None:
    spec = {"base": zoo.base_of("whisper"), "emit": [{"format": "genai", "path": str(tmp_path / "serve")}]}
    with pytest.raises(adaptc.AdaptcError) as caught:
        plan(spec)
    assert (
        "emit.0.format: onnxruntime-genai hears 3000 frames of sound, and the model takes input_features "
        "float32[batch, 8, 24]" in str(caught.value)
    )
    assert "emit onnx: ONNX Runtime runs it" in str(caught.value)
