"""Llama-shaped checkpoints with random weights, written a shard at a time, and a LoRA for each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHARD = 10**9
NOISE = 2**22
"""How many random numbers there are; weights repeat them from other places on, which costs no time."""


@dataclass(frozen=True)
class Shape:
    """A Llama by its sizes."""

    hidden: int
    inner: int
    layers: int
    heads: int
    dtype: str
    key_value_heads: int = 0
    """As many as heads, if it is zero."""

    def config(self) -> Any:
        """Its configuration."""
        from transformers import LlamaConfig

        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads or self.heads,
            dtype=self.dtype,
            architectures=["LlamaForCausalLM"],
        )

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the checkpoint's tensors."""
        from transformers import LlamaForCausalLM

        with torch.device("meta"):
            model = LlamaForCausalLM(self.config())
        yield from ((name, tuple(tensor.shape)) for name, tensor in model.state_dict().items())

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return (
            sum(torch.Size(shape).numel() for _, shape in self.tensors())
            * getattr(torch, self.dtype).itemsize
        )


HUNDRED_MILLION = Shape(768, 2048, 10, 12, "float32", 4)
HALF_BILLION = Shape(1536, 4096, 16, 16, "float32")
SEVEN_BILLION = Shape(4096, 11008, 32, 32, "bfloat16")


def write_checkpoint(shape: Shape, directory: Path) -> None:
    """Write the base, in shards of a gigabyte."""
    directory.mkdir(parents=True)
    shape.config().save_pretrained(directory)
    dtype = getattr(torch, shape.dtype)
    noise = torch.randn(NOISE, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype)
    index: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    for number, (name, size) in enumerate(shape.tensors()):
        count = torch.Size(size).numel()
        if len(size) == 1:
            shard[name] = torch.ones(size, dtype=dtype)
        else:
            rolled = noise.roll(number * 104729)
            shard[name] = rolled.repeat(-(-count // NOISE))[:count].reshape(size).clone()
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD:
            index |= _write_shard(shard, directory)
            shard = {}
    if shard:
        index |= _write_shard(shard, directory)
    document = {"metadata": {"total_size": shape.nbytes}, "weight_map": index}
    (directory / "model.safetensors.index.json").write_text(json.dumps(document))


def _write_shard(shard: dict[str, torch.Tensor], directory: Path) -> dict[str, str]:
    name = f"model-{len(list(directory.glob('*.safetensors'))):05}.safetensors"
    save_file(shard, directory / name, metadata={"format": "pt"})
    return dict.fromkeys(shard, name)


def write_adapter(shape: Shape, base: Path, directory: Path, rank: int = 16) -> None:
    """Write a LoRA on every linear layer but the head, as PEFT would after training."""
    from peft import LoraConfig

    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=TARGETS,
        base_model_name_or_path=str(base),
        task_type="CAUSAL_LM",
    )
    config.save_pretrained(str(directory))
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, size in shape.tensors():
        if any(name.endswith(f"{target}.weight") for target in TARGETS):
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(rank, size[1], generator=generator) * 0.02
            tensors[f"{stem}.lora_B.weight"] = torch.randn(size[0], rank, generator=generator) * 0.02
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
