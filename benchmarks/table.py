"""The table of bases and methods: what holds, and how far from PEFT it is.

`python -m benchmarks.table` writes docs/families.md; with names of families it prints their rows only. It ends with
exit code 1 if an error is above the bound, or a folded graph has other nodes than its base.
"""

from __future__ import annotations

import copy
import math
import sys
import tempfile
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import adaptc
from adaptc.emit.onnx.runtime import onnx_runner
from adaptc.ir.example_inputs import example_sizes, example_tensors
from benchmarks import kinds
from benchmarks.bases import Family, families, make, peft_model

METHODS = ("lora", "dora", "ia3")
SIZES = ((2, 9, 6), (1, 1, 1), (4, 5, 8))
"""Shapes other than those traced: batch 1 with one token among them."""
EPSILONS = 512
BOUND = EPSILONS * torch.finfo(torch.float32).eps
PAGE = Path(__file__).parents[1] / "docs/families.md"
TEXT = """\
# Bases and methods

Largest error over the largest expected value, on three shapes other than those traced, one of them batch 1 with one
token; two-layer models of the real classes, and a module of one's own, with random weights, float32. No error may be
above {epsilons} times float32's epsilon, {bound:.1e}. Made by `python -m benchmarks.table` ({versions}).

{rows}

# Layers and methods

The same for every kind of layer, in a module of a layer, tanh and a head: beside PEFT where it adapts such a layer and
can merge it, else beside the method's expression on the whole weight, in PyTorch.

{kinds}
"""


def error(expected: torch.Tensor, got: torch.Tensor) -> float:
    """The largest difference over the largest expected value; infinite where either is not a number."""
    found = float((expected - got).abs().max() / expected.abs().max())
    return math.inf if math.isnan(found) else found


def compile_family(family: Family, model: Any, directory: Path, adapt: list[Any]) -> adaptc.Compiled:
    """Compile a base of the table with these entries."""
    if family.task is not None:
        return adaptc.compile({"base": {"model": str(directory), "task": family.task}, "adapt": adapt})
    x = torch.randn(3, family.config["features"])
    return adaptc.compile({"adapt": adapt}, model=model, example_inputs=(x,), dynamic={"x": {0: "batch"}})


def logits(output: Any) -> torch.Tensor:
    """The logits of a model output, or the output itself."""
    return getattr(output, "logits", output)


def row(family: Family, model: Any, directory: Path, method: str) -> tuple[dict[str, str], bool]:
    """Trace, train, fold, export and carry one adapter through PEFT and back; and whether all of it holds."""
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
    same = nodes[0] == nodes[1]
    cells = {
        "traced vs eager": f"{worst['trace']:.0e}",
        "live vs PEFT": f"{worst['live']:.0e}",
        "training step": step(compiled, batches[0]),
        "folded vs PEFT": f"{worst['fold']:.0e}",
        "nodes folded = base": f"{nodes[0]} {'=' if same else '≠'} {nodes[1]}",
        "ONNX vs PEFT": f"{worst['onnx']:.0e}",
        "saved, read by PEFT": f"{worst['peft']:.0e}",
    }
    return cells, same and all(value <= BOUND for value in worst.values())


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


def chosen(names: Sequence[str]) -> dict[str, Family]:
    """The families of these names, however they are capitalised; all where there is none."""
    known = families()
    spelled = {name.lower(): name for name in known}
    unknown = [name for name in names if name.lower() not in spelled]
    if unknown:
        sys.exit(f"no such family: {', '.join(unknown)}; known: {', '.join(known)}")
    return {spelled[name.lower()]: known[spelled[name.lower()]] for name in names} or known


def versions() -> str:
    """The packages that the figures come from."""
    names = {"torch": "torch", "transformers": "transformers", "peft": "peft", "onnxruntime": "ONNX Runtime"}
    return ", ".join(f"{name} {version(package).split('+')[0]}" for package, name in names.items())


def kinds_table() -> tuple[list[str], bool]:
    """The table of layers as Markdown, and whether all of it holds."""
    lines: list[str] = []
    holds = True
    for (name, method), cells in kinds.rows():
        if not lines:
            lines = ["| " + " | ".join(["layer", "method", *cells]) + " |", "|" + "---|" * (2 + len(cells))]
        lines.append("| " + " | ".join([name, method, *cells.values()]) + " |")
        print(lines[-1], flush=True)
        errors = [float(cells[key]) for key in ("live", "folded", "ONNX", "saved, read again")]
        holds = holds and max(errors) <= BOUND and "≠" not in cells["nodes folded = base"]
    return lines, holds


def main(names: Sequence[str]) -> int:
    """Print the table as Markdown, and write the page if it is about all families; gives the exit code."""
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    lines: list[str] = []
    holds = True
    for name, family in chosen(names).items():
        model, directory = make(family)
        for method in METHODS:
            cells, held = row(family, model, directory, method)
            holds = holds and held
            if not lines:
                header = ["base", "method", *cells]
                lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
                print(*lines, sep="\n")
            lines.append("| " + " | ".join([name, method, *cells.values()]) + " |")
            print(lines[-1], flush=True)
    if not names:
        layers, held = kinds_table()
        holds = holds and held
        text = TEXT.format(
            epsilons=EPSILONS,
            bound=BOUND,
            versions=versions(),
            rows="\n".join(lines),
            kinds="\n".join(layers),
        )
        PAGE.write_text(text)
    if not holds:
        print(
            f"an error is above {BOUND:.1e}, or a folded graph has other nodes than its base", file=sys.stderr
        )
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
