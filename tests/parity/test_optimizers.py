"""bitsandbytes' optimisers on a quantized model: in 8 bits anywhere, paged where there is a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

import adaptc
from adaptc.compiler.compiled import Compiled

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
SIZES = {"hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": 1, "num_attention_heads": 4}
"""Large enough that A and B have the 4096 numbers from which on bitsandbytes keeps 8 bits of each."""


def qlora() -> Compiled:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=99, use_cache=False, **SIZES))
    ids = torch.zeros(2, 5, dtype=torch.long)
    axes = {0: "batch", 1: "seq"}
    return adaptc.compile(
        {
            "quantize": [{"method": "nf4", "target": "all-linear", "block_size": 32, "double": True}],
            "adapt": [{"method": "lora", "target": "all-linear", "r": 32}],
        },
        model=model,
        example_inputs={"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        dynamic={"input_ids": axes, "attention_mask": axes},
    )


def train(module: Any, optimizer: torch.optim.Optimizer, device: str, steps: int = 20) -> list[float]:
    ids = torch.randint(0, 99, (4, 12), generator=torch.Generator().manual_seed(0)).to(device)
    losses = []
    for _ in range(steps):
        logits = module(input_ids=ids, attention_mask=torch.ones_like(ids))["logits"]
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.slow
def test_eight_bits() -> None:
    """As good as AdamW, in less than a third of its memory."""
    losses, held = {}, {}
    for name, make in {"float": torch.optim.AdamW, "8 bits": bnb.optim.AdamW8bit}.items():
        module = qlora().module.train()
        optimizer: Any = make([p for p in module.parameters() if p.requires_grad], lr=2e-3)
        losses[name] = train(module, optimizer, "cpu")
        states = [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
        held[name] = sum(v.nbytes for v in states if v.numel() > 256)
    assert losses["8 bits"][-1] < 0.9 * losses["8 bits"][0]
    assert abs(losses["8 bits"][-1] - losses["float"][-1]) < 0.02 * losses["float"][0]
    assert held["8 bits"] < 0.3 * held["float"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: paged optimisers are CUDA's own")
def test_paged_on_a_gpu() -> None:
    module = qlora().module.cuda().train()
    optimizer = bnb.optim.PagedAdamW8bit([p for p in module.parameters() if p.requires_grad], lr=2e-3)
    losses = train(module, optimizer, "cuda")
    assert losses[-1] < 0.9 * losses[0]
    states = [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
    assert any(v.dtype == torch.uint8 for v in states)
