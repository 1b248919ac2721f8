"""A small Llama with a tokenizer, a chat template and generation defaults, as a person's own model has them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import adaptc

TEXT = (
    "To be or not to be that is the question whether tis nobler in the mind to suffer the slings and arrows"
)
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ("<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>")
PAD, BOS, EOS = range(3)


def save_tokenizer(directory: Path, template: str | None = TEMPLATE) -> None:
    """A tokenizer of bytes and a few merges, which puts `<s>` in front."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    words.train_from_iterator([TEXT], trainer)
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)


def save_llama(directory: Path, template: str | None = TEMPLATE, **generation: object) -> Path:
    """The model, with random weights and its tokenizer; `generation` are its generation defaults."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS, **generation
    )
    model.save_pretrained(directory)
    save_tokenizer(directory, template)
    return directory


def save_lora(base: Path, directory: Path, seed: int = 1, r: int = 4) -> Path:
    """A PEFT checkpoint of LoRA on it, as if trained."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(r=r, target_modules=["q_proj", "v_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    adapted.save_pretrained(str(directory))
    return directory


@dataclass(frozen=True)
class Served:
    """A model with an adapter, compiled for serving.

    Attributes:
        compiled: the compile.
        base: the model's directory.
        adapter: the adapter's.
        directory: of onnxruntime-genai.
        program: an ONNX file with a cache.
        notes: what the compile told of the directory.
    """

    compiled: adaptc.Compiled
    base: Path
    adapter: Path
    directory: Path
    program: Path
    notes: tuple[str, ...]

    def merged(self) -> Any:
        """The model of transformers with the adapter in its weights, as PEFT merges it."""
        return merged(self.base, self.adapter)


def merged(base: Path, adapter: Path | None = None) -> Any:
    """A model of transformers, with an adapter in its weights as PEFT merges it, that takes the likeliest tokens."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    model.generation_config.do_sample = False
    for name in ("temperature", "top_k", "min_p"):
        setattr(model.generation_config, name, None)
    return model.eval()


def save_served(root: Path) -> Served:
    """The model, its adapter, and what is compiled of them, in a folder."""
    from adaptc.compiler.artifacts.emit import emit_all

    base = save_llama(root / "llama", do_sample=True, temperature=0.75, top_k=20, min_p=0.05)
    adapter = save_lora(base, root / "lora")
    paths = [root / "serve", root / "cached" / "model.onnx"]
    compiled = adaptc.compile(
        {
            "base": {"model": str(base), "task": "causal-lm"},
            "adapt": [{"adapter": str(adapter)}],
            "emit": [
                {"format": "genai", "path": str(paths[0])},
                {"format": "onnx", "path": str(paths[1]), "cache": True},
            ],
        }
    )
    artifacts = emit_all(compiled.program, compiled.spec.emit)
    return Served(compiled, base, adapter, *paths, artifacts[0].notes)


@dataclass(frozen=True)
class Swapped:
    """A model that is compiled for serving with adapters that are swapped.

    Attributes:
        base: the model's directory.
        adapters: name -> PEFT's checkpoint.
        files: name -> ONNX Runtime's file of it.
        directory: of onnxruntime-genai.
        program: an ONNX file with a cache.
        proofs: the names of what was proved.
    """

    base: Path
    adapters: dict[str, Path]
    files: dict[str, Path]
    directory: Path
    program: Path
    proofs: frozenset[str]

    def merged(self, name: str | None) -> Any:
        """The model of transformers with one of the adapters in its weights, or none."""
        return merged(self.base, None if name is None else self.adapters[name])


def save_swapped(root: Path) -> Swapped:
    """The model, two adapters of different ranks, and what is compiled of them, in a folder."""
    from adaptc.compiler.artifacts.emit import emit_all

    base = save_llama(root / "llama")
    adapters = {
        name: save_lora(base, root / name, seed, rank)
        for name, seed, rank in (("alice", 1, 4), ("bob", 2, 2))
    }
    files = {name: root / f"{name}.onnx_adapter" for name in adapters}
    paths = [root / "serve", root / "cached" / "model.onnx"]
    compiled = adaptc.compile(
        {
            "base": {"model": str(base), "task": "causal-lm"},
            "adapters": {name: [{"adapter": str(path)}] for name, path in adapters.items()},
            "emit": [
                {"format": "genai", "path": str(paths[0]), "adapters": "swap"},
                {"format": "onnx", "path": str(paths[1]), "adapters": "swap", "cache": True},
                *({"format": "onnx-adapter", "path": str(file), "name": n} for n, file in files.items()),
            ],
        }
    )
    emit_all(compiled.program, compiled.spec.emit)
    names = frozenset(proof.name for proof in compiled.proofs)
    return Swapped(base, adapters, files, *paths, names)
