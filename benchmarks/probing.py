"""Probing MiniLM: an epoch from the cached trunk beside one of the whole module, and the weights of each."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import adaptc
from benchmarks.field import minilm, rows, tensors
from benchmarks.process import quiet

ROWS, BATCH, EPOCHS = 1024, 32, 3
CASES: dict[str, dict[str, Any]] = {
    "linear probe": {"method": "probe"},
    "mlp probe": {"method": "probe", "head": "mlp"},
    "attention probe": {"method": "probe", "head": "attention"},
    "LoRA r 8 in the last of 6 layers, with a probe": {
        "method": "lora", "r": 8, "target": {"name": ["*.query", "*.value"], "layers": "5"},
    },
}  # fmt: skip


def stored() -> list[dict[str, Tensor]]:
    """Batches of SST-2, with the labels that the model itself does not take."""
    data = rows("train")[:ROWS]
    return [tensors(data[start : start + BATCH]) for start in range(0, len(data), BATCH)]


def epoch(
    module: nn.Module, batches: Iterable[Mapping[str, Tensor]], optimizer: torch.optim.Optimizer
) -> float:
    """Train one epoch; the seconds that it took."""
    start = time.perf_counter()
    for batch in batches:
        taken = {name: value for name, value in batch.items() if name != "labels"}
        loss = functional.cross_entropy(module(**taken)["logits"], batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return time.perf_counter() - start


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def probing() -> None:
    """Print the table."""
    quiet()
    batches = stored()
    inputs = dict.fromkeys(("input_ids", "attention_mask"), "int64[batch, seq]")
    spec = {"base": {"model": str(minilm())}, "inputs": inputs}
    print(f"\nMiniLM, {ROWS} sentences of SST-2 in batches of {BATCH}, one epoch, without dropout:\n")
    print(
        "| trained | whole / trunk | whole | from the trunk | filling the cache | largest difference of a weight |"
    )
    print("|---|---|---|---|---|---|")
    for what, entry in CASES.items():
        probe = [] if entry["method"] == "probe" else [CASES["linear probe"]]
        compiled = adaptc.compile({**spec, "adapt": [entry, *probe]})
        module, work = compiled.module.eval(), Path(tempfile.mkdtemp(prefix="adaptc-bench-"))
        start = time.perf_counter()
        rest = compiled.trunk(batches, cache=work)
        filling = time.perf_counter() - start
        initial = {name: p.detach().clone() for name, p in trained(module).items()}
        seconds: list[float] = []
        ends: list[dict[str, Tensor]] = []
        for part, given in ((module, batches), (rest.module, rest)):
            with torch.no_grad():
                for name, p in trained(module).items():
                    p.copy_(initial[name])
            optimizer = torch.optim.SGD(trained(part).values(), lr=0.1)
            seconds.append(min(epoch(part, given, optimizer) for _ in range(EPOCHS)))
            ends.append({name: p.detach().clone() for name, p in trained(module).items()})
        apart = max(float((ends[0][name] - ends[1][name]).abs().max()) for name in initial)
        print(
            f"| {what} | {seconds[0] / seconds[1]:.1f} | {seconds[0]:.3g} s | {seconds[1]:.3g} s "
            f"| {filling:.3g} s | {apart:.1e} |",
            flush=True,
        )
        shutil.rmtree(work)
