"""QLoRA: a decoder's layers in 4 bits, LoRA in floats: `python examples/qlora.py MODEL TEXT_FILE [STEPS]`."""

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer

import adaptc


def train(model: str, text: str, steps: int, output: Path, length: int = 64) -> list[float]:
    """Train on pieces of a text, write the adapter as a PEFT checkpoint, and give the losses."""
    spec = {
        "base": {"model": str(Path(model).resolve()), "task": "causal-lm"},
        "inputs": dict.fromkeys(("input_ids", "attention_mask", "labels"), "int64[batch, seq]"),
        "quantize": [{"method": "nf4", "target": "all-linear", "double": True}],
        "adapt": [{"method": "lora", "target": "all-linear", "r": 16, "alpha": 32}],
    }
    compiled = adaptc.compile(spec)
    module = compiled.module.train()
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=2e-4)
    ids = torch.tensor(Tokenizer.from_file(f"{model}/tokenizer.json").encode(text).ids)
    losses = []
    for _ in range(steps):
        starts = torch.randint(max(len(ids) - length, 1), (8,))
        rows = torch.stack([ids[start : start + length] for start in starts])
        loss = module(input_ids=rows, attention_mask=torch.ones_like(rows), labels=rows)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    compiled.save_adapter(output)
    return losses


if __name__ == "__main__":
    asked = int(sys.argv[3]) if len(sys.argv) > 3 else 100
    losses = train(sys.argv[1], Path(sys.argv[2]).read_text(), asked, Path("build/qlora"))
    print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}; the adapter is in build/qlora")
