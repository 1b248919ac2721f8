"""Models that are large: adapter to folded ONNX beside PEFT, time and memory."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from benchmarks.fold import Taken, measure
from benchmarks.llama import HALF_BILLION, SEVEN_BILLION, Shape, write_adapter, write_checkpoint


def half_billion() -> None:
    """A Llama of half a billion parameters in float32, both sides."""
    _fold("half a billion parameters, float32, LoRA r 16 on every linear", HALF_BILLION, ("adaptc", "peft"))


def seven_billion() -> None:
    """The shape of Llama-2-7B in bfloat16; PEFT's way takes more memory than this machine has, so only ours."""
    _fold("Llama-2-7B's shape, bfloat16, LoRA r 16 on every linear", SEVEN_BILLION, ("adaptc",))


def _fold(title: str, shape: Shape, sides: tuple[str, ...]) -> None:
    needed = shape.nbytes * (1 + len(sides)) + 2 * 10**9
    free = shutil.disk_usage(tempfile.gettempdir()).free
    print(f"\n| {title} | time | peak memory above the imports | over the weights' {gb(shape.nbytes)} |")
    print("|---|---|---|---|", flush=True)
    if free < needed:
        print(f"| skipped: {gb(needed)} of disk needed, {gb(free)} free | | | |", flush=True)
        return
    with tempfile.TemporaryDirectory(prefix="adaptc-bench-") as folder:
        work = Path(folder)
        write_checkpoint(shape, work / "base")
        write_adapter(shape, work / "base", work / "adapter")
        taken: dict[str, Taken] = {}
        for side in sides:
            (work / side).mkdir()
            arguments = (work / "base", "causal-lm", work / "adapter", work / side / "model.onnx")
            taken[side] = found = measure(side, *arguments)
            share = found.bytes / shape.nbytes
            print(f"| {side} | {found.seconds:.1f} s | {gb(found.bytes)} | {share:.2f} |", flush=True)
            shutil.rmtree(work / side)
        if len(taken) == 2:
            ours, theirs = taken["adaptc"], taken["peft"]
            print(
                f"| adaptc / PEFT | {ours.seconds / theirs.seconds:.2f} | {ours.bytes / theirs.bytes:.2f} | |"
            )
        for proof in taken["adaptc"].proofs:
            print(f"\n{proof}")


def gb(count: float) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.2f} GB"
