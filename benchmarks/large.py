"""Models that are large: adapter to folded ONNX and training beside PEFT, time and memory, and latency."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import adaptc
from adaptc.emit.onnx.runtime import open_session
from benchmarks.llama import HALF_BILLION, SEVEN_BILLION, Shape, write_adapter, write_checkpoint
from benchmarks.minilm import line, side_by_side
from benchmarks.process import Taken, batch, measure

SIDES = ("adaptc", "peft")


def half_billion() -> None:
    """A Llama of half a billion parameters in float32: both sides, trained too, and run."""
    with written(HALF_BILLION, 6) as work:
        if work is None:
            return
        _fold("half a billion parameters, float32, LoRA r 16 on every linear: to ONNX", HALF_BILLION, work)
        _fold("the same, to a merged directory", HALF_BILLION, work, form="hf")
        _train(work)
        _latency(work)


def seven_billion() -> None:
    """The shape of Llama-2-7B in bfloat16; PEFT's way takes more memory than this machine has, so only ours."""
    with written(SEVEN_BILLION, 2) as work:
        if work is not None:
            title = "Llama-2-7B's shape, bfloat16, LoRA r 16 on every linear"
            _fold(f"{title}: to ONNX", SEVEN_BILLION, work, SIDES[:1])
            shutil.rmtree(work / SIDES[0])
            _fold("the same, to a merged directory", SEVEN_BILLION, work, SIDES[:1], "hf")


@contextmanager
def written(shape: Shape, copies: int) -> Iterator[Path | None]:
    """A folder with a base and an adapter in it, or None where the disk has no room for so many copies."""
    needed = shape.nbytes * copies + 2 * 10**9
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if free < needed:
        print(f"\nSkipped: {gb(needed)} of disk needed, {gb(free)} free.", flush=True)
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="adaptc-bench-") as folder:
        work = Path(folder)
        write_checkpoint(shape, work / "base")
        write_adapter(shape, work / "base", work / "adapter")
        yield work


def _fold(title: str, shape: Shape, work: Path, sides: tuple[str, ...] = SIDES, form: str = "onnx") -> None:
    print(f"\n| {title} | time | peak memory above the imports | over the weights' {gb(shape.nbytes)} |")
    print("|---|---|---|---|", flush=True)
    taken: dict[str, Taken] = {}
    for side in sides:
        (work / side).mkdir(exist_ok=True)
        output = work / side / ("merged" if form == "hf" else "model.onnx")
        taken[side] = found = measure(
            "fold", side, work / "base", "causal-lm", work / "adapter", output, form
        )
        share = found.bytes / shape.nbytes
        print(f"| {side} | {found.seconds:.1f} s | {gb(found.bytes)} | {share:.2f} |", flush=True)
    if len(taken) == 2:
        _ratio(taken)
    for proof in taken["adaptc"].proofs:
        print(f"\n{proof}")


def _train(work: Path) -> None:
    print("\n| the same, training on 2 x 64 tokens | time of a step | peak memory above the imports |")
    print("|---|---|---|", flush=True)
    for how in ("eager", "compiled"):
        taken = {
            side: measure("train", side, work / "base", "causal-lm", work / "adapter", how, 2)
            for side in SIDES
        }
        for side, found in taken.items():
            print(f"| {side}, {how} | {found.seconds:.2f} s | {gb(found.bytes)} |", flush=True)
        _ratio(taken)


def _latency(work: Path) -> None:
    """Folded over base, and over PEFT's export, in ONNX Runtime."""
    compiled = adaptc.compile({"base": {"model": str(work / "base"), "task": "causal-lm"}, "adapt": []})
    (work / "none").mkdir()
    compiled.emit("onnx", work / "none/model.onnx", adapters="none")
    feeds = {name: tensor.numpy() for name, tensor in batch(1, 64).items()}
    print(
        "\n| the same, latency of 1 x 64 tokens | ratio | folded | the other |\n|---|---|---|---|", flush=True
    )
    for what, other in (("folded over base", "none"), ("folded against PEFT's export", "peft")):
        sessions = (open_session(work / name / "model.onnx") for name in ("adaptc", other))
        ours, theirs = (partial(session.run, None, feeds) for session in sessions)
        line(what, *side_by_side(ours, theirs, 10))


def _ratio(taken: dict[str, Taken]) -> None:
    ours, theirs = taken["adaptc"], taken["peft"]
    print(
        f"| adaptc / PEFT | {ours.seconds / theirs.seconds:.2f} | {ours.bytes / theirs.bytes:.2f} |",
        flush=True,
    )


def gb(count: float) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.2f} GB"
