"""The table of bases and methods: what holds, and how far from PEFT it is. `python -m benchmarks.table`."""

from __future__ import annotations

import copy
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

import adaptc
from adaptc.emit.onnx import onnx_runner
from adaptc.tracing.export import example_sizes, example_tensors
from benchmarks.bases import Family, families, make, peft_model

METHODS = ("lora", "dora", "ia3")
SIZES = ((2, 9, 6), (1, 1, 1), (4, 5, 8))
"""Shapes other than those traced: batch 1 with one token among them."""


def error(expected: torch.Tensor, got: torch.Tensor) -> float:
    """The largest difference over the largest expected value."""
    return float((expected - got).abs().max() / expected.abs().max())


def compile_family(family: Family, model: Any, directory: Path, adapt: list[Any]) -> adaptc.Compiled:
    """Compile a base of the table with these entries."""
    if family.task is not None:
        return adaptc.compile({"base": {"model": str(directory), "task": family.task}, "adapt": adapt})
    x = torch.randn(3, family.config["features"])
    return adaptc.compile({"adapt": adapt}, model=model, example_inputs=(x,), dynamic={"x": {0: "batch"}})


def logits(output: Any) -> torch.Tensor:
    """The logits of a model output, or the output itself."""
    return getattr(output, "logits", output)


def row(family: Family, model: Any, directory: Path, method: str) -> dict[str, str]:
    """Trace, train, fold, export and carry one adapter through PEFT and back."""
    from peft import PeftModel

    work = Path(tempfile.mkdtemp(prefix="adaptc-table-"))
    reference = peft_model(copy.deepcopy(model), family, method)
    reference.save_pretrained(work / "peft")
    compiled = compile_family(family, model, directory, [{"adapter": str(work / "peft")}])
    inputs = compiled.base.inputs
    batches = [example_tensors(inputs, example_sizes(inputs, s), 5, pad=True) for s in SIZES]
    module, folded = compiled.module.eval(), compiled.fold()
    compiled.emit("onnx", work / "folded.onnx")
    program = onnx_runner(work / "folded.onnx")
    compiled.save_adapter(work / "ours")
    again = PeftModel.from_pretrained(copy.deepcopy(model), str(work / "ours")).eval()
    worst: dict[str, float] = dict.fromkeys(("trace", "live", "fold", "onnx", "peft"), 0.0)
    with torch.no_grad():
        traced = compile_family(family, model, directory, []).module.eval()
        for tensors in batches:
            expected = logits(reference(**tensors))
            for name, got, against in (
                ("trace", logits(traced(**tensors)), logits(model(**tensors))),
                ("live", logits(module(**tensors)), expected),
                ("fold", logits(folded(**tensors)), expected),
                ("onnx", program(tensors)[0], expected),
                ("peft", logits(again(**tensors)), expected),
            ):
                worst[name] = max(worst[name], error(against, got))
    nodes = len(compiled.folded_graph().operations), len(compiled.base.operations)
    return {
        "traced vs eager": f"{worst['trace']:.0e}",
        "live vs PEFT": f"{worst['live']:.0e}",
        "training step": step(compiled, batches[0]),
        "folded vs PEFT": f"{worst['fold']:.0e}",
        "nodes folded = base": f"{nodes[0]} = {nodes[1]}"
        if nodes[0] == nodes[1]
        else f"{nodes[0]} ≠ {nodes[1]}",
        "ONNX vs PEFT": f"{worst['onnx']:.0e}",
        "saved, read by PEFT": f"{worst['peft']:.0e}",
    }


def step(compiled: Any, tensors: dict[str, torch.Tensor]) -> str:
    """The loss before and after ten steps of Adam."""
    module = compiled.module.train()
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    torch.manual_seed(0)
    for _ in range(11):
        scores = logits(module(**tensors)).flatten(0, -2)
        loss = torch.nn.functional.cross_entropy(scores, torch.arange(len(scores)) % scores.shape[-1])
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return f"{losses[0]:.2f} to {losses[-1]:.2f}"


def main() -> None:
    """Print the table as Markdown."""
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    header: list[str] = []
    for name, family in families().items():
        model, directory = make(family)
        for method in METHODS:
            cells = row(family, model, directory, method)
            if not header:
                header = ["base", "method", *cells]
                print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
            print("| " + " | ".join([name, method, *cells.values()]) + " |", flush=True)


if __name__ == "__main__":
    main()
