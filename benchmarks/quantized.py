"""QLoRA on a Llama of half a billion parameters, each side in a process of its own; fold orders on MiniLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import adaptc
from benchmarks.field import minilm
from benchmarks.large import SIDES, gb, written
from benchmarks.llama import HALF_BILLION
from benchmarks.process import measure, quiet
from benchmarks.qlora import ORDERS
from benchmarks.runtime import CALIBRATION, sentences

SCHEMES: dict[str, dict[str, Any]] = {
    "int8, a scale a row": {"method": "int8"},
    "nf4, double": {"method": "nf4", "double": True},
    "int4, blocks of 128": {"method": "int4"},
    "GPTQ, 4 bits, blocks of 128": {"method": "gptq"},
}


def half_billion_in_bits() -> None:
    """Print the table: from floats that each side quantizes, and from a checkpoint that bitsandbytes has written."""
    quiet()
    with written(HALF_BILLION, 3) as work:
        if work is None:
            return
        _by_bitsandbytes(work / "base", work / "bits")
        print(
            "\n| half a billion parameters, NF4 with double quantization, LoRA r 16 | state dict | resident | peak | "
            "training step |\n|---|---|---|---|---|"
        )
        for dtype in ("float32", "bfloat16"):
            for stored, base in (("floats", work / "base"), ("bits", work / "bits")):
                _rows(dtype, stored, base)
        print("\nMemory above the imports; the step is one of 64 tokens.")


def _rows(dtype: str, stored: str, base: Path) -> None:
    taken = {side: measure("qlora", side, base, stored, dtype) for side in SIDES}
    for side, found in taken.items():
        row = f"{gb(found.held)} | {gb(found.resident)} | {gb(found.bytes)} | {found.seconds:.2f} s"
        print(f"| {side}, {dtype}, a checkpoint in {stored} | {row} |", flush=True)
    ours, theirs = taken.values()
    ratios = [getattr(ours, n) / getattr(theirs, n) for n in ("held", "resident", "bytes", "seconds")]
    print(f"| adaptc / PEFT | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |", flush=True)


def _by_bitsandbytes(base: Path, directory: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=bits, device_map={"": "cpu"})
    model.save_pretrained(directory)


def orders() -> None:
    """Print the table: MiniLM with a LoRA that is not zero, in every order of fold and quantize."""
    quiet()
    rows = sentences()
    lora = {"method": "lora", "target": "all-linear", "r": 8, "alpha": 16}
    spec = {"base": {"model": str(minilm())}, "adapt": [lora]}
    print(
        "\n| MiniLM, all linear layers, LoRA r 8 | order | expected | worst layer's weight | worst layer's output | "
        "last hidden state |\n|---|---|---|---|---|---|"
    )
    for name, options in SCHEMES.items():
        for order, passes in ORDERS.items():
            quantize = [{"target": "all-linear", **options}]
            more = {"passes": passes} if passes else {}
            made = adaptc.compile({**spec, "quantize": quantize, **more}, calibration=rows[:CALIBRATION])
            _perturb(made)
            errors = made.quantization_errors("folded" if passes else "live")
            assert errors is not None
            expected = made.plan.quantized[0].expected().get(order.partition(" (")[0])
            weight = max(layer.weight for layer in errors.layers)
            shown = "" if expected is None else f"{expected:.3f}"
            row = f"{weight:.4f} | {errors.layers[0].error:.4f} | {errors.outputs['last_hidden_state']:.4f}"
            print(f"| {name} | {order} | {shown} | {row} |", flush=True)


def _perturb(made: adaptc.Compiled) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.module.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.02, generator=generator)
