"""A batch in which each row has its own adapter: beside the base alone, beside PEFT's `adapter_names`, and a swap."""

from __future__ import annotations

import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import adaptc
from adaptc.emit.onnx.runtime import open_session
from benchmarks.process import quiet

ROUNDS = 20
BATCH, LENGTH, RANK = 8, 64, 8
COUNTS = (2, 8, 32, 128)
TARGET = ["*.query", "*.value"]


def rows(counts: tuple[int, ...] = COUNTS, layers: int = 6, hidden: int = 384) -> None:
    """Print the table.

    Args:
        counts: how many adapters there are.
        layers: of the encoder.
        hidden: its width.
    """
    quiet()
    torch.set_num_threads(1)
    work = Path(tempfile.mkdtemp(prefix="adaptc-bench-"))
    _save_base(work / "base", layers, hidden)
    print(
        "\n| LoRA adapters | in ONNX Runtime, over the base | in torch, over the base | PEFT's `adapter_names`, "
        "over the base in torch | PEFT over adaptc in torch | MB of the program for each | a swap in torch, µs |\n"
        "|---|---|---|---|---|---|---|"
    )
    for count in counts:
        print(f"| {count} | {' | '.join(_one(work, count))} |", flush=True)
    print(
        f"\nMedians of CPU time of {ROUNDS} interleaved runs on one thread that does not spin: {BATCH} rows of "
        f"{LENGTH} tokens, each with the next adapter in turn; an encoder of {layers} layers of {hidden} with random "
        f"weights, rank {RANK} on queries and values."
    )
    shutil.rmtree(work)


def _save_base(folder: Path, layers: int, hidden: int) -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=2000,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=12,
    )
    BertModel(config).save_pretrained(folder)


def _one(work: Path, count: int) -> list[str]:
    """The cells of a row of the table."""
    names = [f"user{number}" for number in range(count)]
    entry = {"method": "lora", "target": TARGET, "r": RANK}
    spec: dict[str, Any] = {
        "base": {"model": str(work / "base"), "task": "feature-extraction"},
        "adapters": {name: [entry] for name in names},
    }
    compiled = adaptc.compile(spec)
    module: Any = compiled.module.eval()
    _randomise(module)
    base, many = work / f"base-{count}.onnx", work / f"rows-{count}.onnx"
    compiled.emit("onnx", base, adapters="none")
    compiled.emit("onnx", many, adapters="rows")
    feeds = _feeds()
    ids = np.arange(BATCH) % count
    sessions = open_session(base), open_session(many)
    onnx = _medians(
        {
            "base": lambda: sessions[0].run(None, feeds),
            "rows": lambda: sessions[1].run(None, {**feeds, "adapter_ids": ids}),
        }
    )
    tensors = {name: torch.from_numpy(value) for name, value in feeds.items()}
    peft = _peft(work / "base", names)
    calls: dict[str, Callable[[], Any]] = {
        "base": lambda: module(**tensors),
        "rows": lambda: module(**tensors, adapter_ids=torch.from_numpy(ids)),
        "peft": lambda: peft(**tensors, adapter_names=[names[number] for number in ids]),
    }
    with torch.no_grad():
        eager = _medians(calls)
    swaps = [_timed(lambda n=name: module.set_adapter(n)) for name in (*names, *names)]
    size = (many.stat().st_size - base.stat().st_size) / count / 1e6
    return [
        f"{onnx['rows'] / onnx['base']:.2f}",
        f"{eager['rows'] / eager['base']:.2f}",
        f"{eager['peft'] / eager['base']:.2f}",
        f"{eager['peft'] / eager['rows']:.2f}",
        f"{size:.2f}",
        f"{1e6 * statistics.median(swaps):.0f}",
    ]


def _randomise(module: torch.nn.Module) -> None:
    """Give every adapter random tensors, so that a proof cannot miss one."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))


def _peft(folder: Path, names: list[str]) -> Any:
    """The base with as many adapters in PEFT."""
    from peft import LoraConfig, get_peft_model
    from transformers import BertModel

    config = LoraConfig(r=RANK, target_modules=["query", "value"], init_lora_weights=False)
    model: Any = get_peft_model(BertModel.from_pretrained(folder), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    return model.eval()


def _feeds() -> dict[str, Any]:
    ids = np.random.default_rng(0).integers(3, 2000, (BATCH, LENGTH))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def _medians(calls: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """The median time of each call; the calls are interleaved."""
    times = {name: list[float]() for name in calls}
    for number in range(ROUNDS + 2):
        for name in random.sample(list(calls), len(calls)):
            seconds = _timed(calls[name])
            if number > 1:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def _timed(call: Callable[[], Any]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start
