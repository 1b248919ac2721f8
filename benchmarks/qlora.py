"""QLoRA on a small Llama that has read Shakespeare: losses, steps, bytes and orders, beside bitsandbytes."""

from __future__ import annotations

import copy
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import adaptc
from benchmarks.field import ROOT
from benchmarks.minilm import line, side_by_side
from benchmarks.process import quiet

TEXT = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LENGTH, ROWS = 128, 16
PRETRAINING, STEPS, SHOWN = 300, 60, 10
LORA = {"method": "lora", "target": "all-linear", "r": 8, "alpha": 16}
SCHEMES: dict[str, dict[str, Any]] = {
    "nf4": {"method": "nf4"},
    "nf4, double": {"method": "nf4", "double": True},
    "fp4": {"method": "fp4"},
    "int4, blocks of 128": {"method": "int4"},
    "int4, blocks of 128, clip": {"method": "int4", "clip": True},
    "int4, blocks of 32": {"method": "int4", "block_size": 32},
    "GPTQ, blocks of 128": {"method": "gptq"},
    "AWQ, blocks of 128": {"method": "awq"},
    "int8, a scale a row": {"method": "int8"},
    "int2, blocks of 32, clip": {"method": "int2", "block_size": 32, "clip": True},
    "GPTQ, 2 bits, blocks of 32": {"method": "gptq", "bits": 2, "block_size": 32},
}
ORDERS = {
    "quantize, insert (live)": None,
    "insert, fold, quantize": ["insert", "fold", "quantize"],
    "quantize, insert, fold, quantize": ["quantize", "insert", "fold", "quantize"],
    "quantize, insert, fold (floats)": ["quantize", "insert", "fold"],
}


def qlora() -> None:
    """Print the tables."""
    quiet()
    if not TEXT.is_file():
        print(f"{TEXT} is missing: nothing to train on")
        return
    torch.manual_seed(0)
    work = Path(tempfile.mkdtemp(prefix="adaptc-bench-"))
    text = TEXT.read_text()
    letters = {letter: index for index, letter in enumerate(sorted(set(text)))}
    ids = torch.tensor([letters[letter] for letter in text])
    comedy, tragedy = ids[: len(ids) // 2], ids[len(ids) // 2 : -50_000]
    held = list(_batches(ids[-50_000:], 12, seed=99))
    _pretrained(work / "base", len(letters), comedy)
    spec = {"base": {"model": str(work / "base"), "task": "causal-lm"}}
    rows = [{name: tensor[:4] for name, tensor in batch.items()} for batch in _batches(comedy, 8, seed=3)]
    _schemes(spec, held, rows)
    _curves(spec, work, tragedy, held)
    shutil.rmtree(work)


def _batches(ids: torch.Tensor, count: int, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        starts = torch.randint(0, len(ids) - LENGTH, (ROWS,), generator=generator)
        rows = torch.stack([ids[start : start + LENGTH] for start in starts.tolist()])
        yield {"input_ids": rows, "attention_mask": torch.ones_like(rows)}


def _loss(module: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    logits = module(**batch)["logits"]
    return nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), batch["input_ids"][:, 1:].flatten()
    )


def _perplexity(module: nn.Module, batches: list[dict[str, torch.Tensor]]) -> float:
    with torch.no_grad():
        return math.exp(sum(float(_loss(module.eval(), batch)) for batch in batches) / len(batches))


def _train(module: nn.Module, ids: torch.Tensor, steps: int, lr: float) -> list[float]:
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    losses = []
    for batch in _batches(ids, steps, seed=1):
        loss = _loss(module.train(), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def _pretrained(directory: Path, letters: int, ids: torch.Tensor) -> None:
    """A Llama of 3.2 million weights that has read half of the plays, for some minutes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=letters,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=256,
    )
    model = LlamaForCausalLM(config)
    losses = _train(model, ids, PRETRAINING, 2e-3)
    print(f"\nPretrained in {PRETRAINING} steps: loss {losses[0]:.2f} to {sum(losses[-10:]) / 10:.2f}")
    model.save_pretrained(directory)


def _schemes(spec: dict[str, Any], held: list[Any], rows: list[Any]) -> None:
    plain = adaptc.compile(spec)
    want = _perplexity(plain.fold(), held)
    print(
        "\n| scheme | bytes / float32's | weights' error | outputs' error | perplexity |\n|---|---|---|---|---|"
    )
    print(f"| float32 | 1 | 0 | 0 | {want:.4f} |", flush=True)
    for name, options in SCHEMES.items():
        made = adaptc.compile({**spec, "quantize": [{"target": "all-linear", **options}]}, calibration=rows)
        errors = made.quantization_errors()
        assert errors is not None
        weight = (sum(layer.weight**2 for layer in errors.layers) / len(errors.layers)) ** 0.5
        got = _perplexity(made.fold(), held)
        row = f"{errors.share:.3f} | {weight:.4f} | {errors.outputs['logits']:.4f} | {got:.4f}"
        print(f"| {name} | {row} |", flush=True)


def _curves(spec: dict[str, Any], work: Path, ids: torch.Tensor, held: list[Any]) -> None:
    quantize = [{"method": "nf4", "target": "all-linear", "double": True}]
    float_lora = adaptc.compile({**spec, "adapt": [LORA]})
    qlora = adaptc.compile({**spec, "quantize": quantize, "adapt": [LORA]})
    start = copy.deepcopy(float_lora.module.state_dict())
    qlora.module.load_state_dict({n: start[n] for n in qlora.graph.adapter_names}, strict=False)
    loftq = adaptc.compile({**spec, "quantize": quantize, "adapt": [{**LORA, "init_weights": "loftq"}]})
    sides: dict[str, nn.Module] = {
        "LoRA on floats": float_lora.module,
        "QLoRA (NF4, double)": qlora.module,
        "QLoRA, LoftQ's start": loftq.module,
    }
    theirs = _theirs(work, {n: start[n] for n in qlora.graph.adapter_names})
    if theirs is not None:
        sides["PEFT and bitsandbytes, the same"] = theirs
    shown = range(0, STEPS + 1, SHOWN)
    print(
        f"\n| loss at step | {' | '.join(map(str, shown))} | perplexity |\n|---|{'---|' * (len(shown) + 1)}"
    )
    for name, module in sides.items():
        losses = _train(module, ids, STEPS + 1, 1e-3)
        curve = " | ".join(f"{losses[step]:.4f}" for step in shown)
        print(f"| {name} | {curve} | {_perplexity(module, held):.4f} |", flush=True)
    _orders(spec, work, quantize, held, {"trained on floats": float_lora, "trained on bits": qlora})
    if theirs is not None:
        batch = next(_batches(ids, 1, seed=5))
        print("\n| Llama, NF4 with double quantization | adaptc / PEFT | adaptc | PEFT |\n|---|---|---|---|")
        ours, other = (lambda m=m: _loss(m.train(), batch).backward() for m in (qlora.module, theirs))
        line(f"QLoRA training step, {ROWS} x {LENGTH}", *side_by_side(ours, other, 9))


def _orders(
    spec: dict[str, Any], work: Path, quantize: list[Any], held: list[Any], trained: Mapping[str, Any]
) -> None:
    print("\n| adapter | order | worst layer's error | outputs' error | perplexity |\n|---|---|---|---|---|")
    for number, (name, made) in enumerate(trained.items()):
        adapter = work / f"adapter-{number}"
        made.save_adapter(adapter)
        for order, passes in ORDERS.items():
            more = {"passes": passes} if passes else {}
            again = adaptc.compile(
                {**spec, "quantize": quantize, "adapt": [{"adapter": str(adapter)}], **more}
            )
            module = again.fold() if passes else again.module
            errors = again.quantization_errors("folded" if passes else "live")
            assert errors is not None
            row = f"{errors.layers[0].error:.4f} | {errors.outputs['logits']:.4f} | {_perplexity(module, held):.4f}"
            print(f"| {name} | {order} | {row} |", flush=True)


def _theirs(work: Path, adapters: Mapping[str, torch.Tensor]) -> nn.Module | None:
    """PEFT on bitsandbytes' layers, with the same first adapters; None where these do not run here."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            work / "base", quantization_config=bits, dtype=torch.float32, device_map={"": "cpu"}
        )
    except Exception as error:
        print(f"\nbitsandbytes' layers do not run here: {str(error).splitlines()[0]}")
        return None
    model = get_peft_model(
        model, LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM")
    )
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in adapters.items():
            own[f"base_model.model.{name}"].copy_(value)
    return model
