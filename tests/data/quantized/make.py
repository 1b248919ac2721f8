"""Makes the checkpoints in this directory by GPTQModel (7.7.0), and what it makes of their weights.

Run by hand, with gptqmodel installed and a tokenizer's files in the directory that is given:
    python tests/data/quantized/make.py tokenizer-directory
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
KEPT = ("q_proj", "down_proj")
"""Layers whose weights are kept to compare with."""
CONFIGS = {
    "gptq": {"bits": 4, "group_size": 32, "sym": True, "desc_act": False},
    "gptq-asymmetric": {"bits": 4, "group_size": 32, "sym": False, "desc_act": False},
    "gptq-v2": {"bits": 4, "group_size": 32, "sym": False, "desc_act": False, "format": "gptq_v2"},
    "gptq-ordered": {"bits": 4, "group_size": 32, "sym": False, "desc_act": True},
    "gptq-2-bits": {"bits": 2, "group_size": 32, "sym": False, "desc_act": False},
    "gptq-8-bits": {"bits": 8, "group_size": -1, "sym": True, "desc_act": False, "act_group_aware": False},
    "awq": {"bits": 4, "group_size": 32, "quant_method": "awq", "format": "gemm"},
}


def main(tokenizer: Path, scratch: Path = Path("/tmp/adaptc-quantized")) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = LlamaConfig(vocab_size=64, num_hidden_layers=1, tie_word_embeddings=False, **sizes)
    LlamaForCausalLM(config).half().save_pretrained(scratch / "base")
    for file in tokenizer.glob("*token*"):
        shutil.copy(file, scratch / "base")
    rows = [
        {"input_ids": torch.randint(0, 64, (1, 64)), "attention_mask": torch.ones(1, 64, dtype=torch.long)}
        for _ in range(64)
    ]
    for name, options in CONFIGS.items():
        model = GPTQModel.load(str(scratch / "base"), QuantizeConfig(**options, device="cpu"))
        model.quantize(rows, batch_size=1)
        model.save(str(scratch / name))
        known = json.loads((scratch / name / "config.json").read_text())
        known["quantization_config"].pop("meta", None)
        (HERE / name).mkdir(exist_ok=True)
        (HERE / name / "config.json").write_text(json.dumps(known, indent=2) + "\n")
        shutil.copy(scratch / name / "model.safetensors", HERE / name)
        how = {"backend": BACKEND.TORCH, "device": "cpu", "dtype": torch.float16}
        loaded = GPTQModel.load(str(scratch / name), **how)
        found = {
            f"{module_name.removeprefix('model.model.')}.weight": _weight(module)
            for module_name, module in loaded.named_modules()
            if module_name.endswith(KEPT)
        }
        made = {key: value.t().contiguous().half() for key, value in found.items()}
        save_file(made, HERE / f"{name}.safetensors")


def _weight(module: torch.nn.Module) -> torch.Tensor:
    """(in, out), as its products are computed with."""
    if hasattr(module, "dequantize_weight"):
        return module.dequantize_weight()
    eye = torch.eye(module.in_features, dtype=torch.float16)
    return module(eye)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
