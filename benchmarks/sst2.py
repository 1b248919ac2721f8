"""SST-2 on MiniLM: the accuracy of every method after equal steps, beside PEFT's and full fine-tuning's.

`python -m benchmarks.sst2` writes benchmarks/sst2.md and sst2.svg; with names of methods it prints their rows only.
Both sides start from the same numbers, and see the same batches.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import adaptc
from benchmarks.__main__ import machine
from benchmarks.field import HEAD, batches, classifier, compiled, known, peft_model, rows, tensors, trained
from benchmarks.process import quiet

PAGE = Path(__file__).with_name("sst2.md")
STEPS, BATCH = 100, 16
RATES = {
    **{"full fine-tuning": 1e-4, "full": 3e-4, "child-tuning": 2e-4, "fishmask": 1e-3, "c3a": 2e-2},
    **dict.fromkeys(("fourierft", "vblora", "vera"), 1e-2),
    **dict.fromkeys(("ia3", "road", "prefix", "p-tuning-v2"), 5e-3),
    **dict.fromkeys(("prompt", "compacter"), 1e-2),
    "miss": 3e-4,
    "randlora": 3e-4,
}
"""Learning rates where 2e-3 is not a good one: methods with few or bounded parameters take larger steps."""
TEXT = """\
# SST-2

`python -m benchmarks.sst2` on {machine}.

Accuracy on the {tests} sentences of the development set after {steps} steps of AdamW on {batch} sentences each
(seed 0, no schedule), of all-MiniLM-L6-v2 with a new head, which is trained too and not counted. PEFT starts from the
same numbers, has the same optimizer and sees the same batches; where it has no such method there is a dash. An
untrained head gives {before:.1%}. A development set of this size tells differences of about two points. DyLoRA's
adapter is LoRA to PEFT, which trains it as that.

{table}

![accuracy against trained parameters](sst2.svg)
"""


@dataclass(frozen=True)
class Result:
    """What one method reached: trained parameters, accuracy here and in PEFT."""

    name: str
    trained: int
    ours: float
    theirs: float | None

    @property
    def row(self) -> str:
        """As a line of the table."""
        theirs = "-" if self.theirs is None else f"{self.theirs:.1%}"
        return f"| `{self.name}` | {self.trained:,} | {self.ours:.1%} | {theirs} | {_rate(self.name):g} |"


def _rate(name: str) -> float:
    return RATES.get(name, 2e-3)


def accuracy(module: Any) -> float:
    """The share of the development set that is told right."""
    data, right = rows("dev"), 0
    module.eval()
    with torch.no_grad():
        for start in range(0, len(data), 64):
            batch = tensors(data[start : start + 64])
            right += int((module(**batch)["logits"].argmax(-1) == batch["labels"]).sum())
    return right / len(data)


def train(module: Any, name: str, step: Any) -> float:
    """Train for the steps, and give the accuracy."""
    torch.manual_seed(0)
    random.seed(0)
    module.train()
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=_rate(name))
    for number, batch in enumerate(batches(STEPS, BATCH), 1):
        module(**batch)["loss"].backward()
        step(optimizer, number)
        optimizer.zero_grad()
    return accuracy(module)


def measure(name: str) -> Result:
    """Both sides of one method."""
    options = {"tinit": 20, "tfinal": 40, "deltaT": 5, "total_step": STEPS} if name == "adalora" else {}
    made = compiled(name, HEAD, **options)
    theirs = peft_model(made)
    rules = adaptc.TrainingStep(made.module, steps=STEPS)
    ours = train(made.module, name, lambda optimizer, _: rules(optimizer))
    reached = None
    if theirs is not None:
        allocate = getattr(theirs.base_model, "update_and_allocate", None)

        def step(optimizer: Any, number: int) -> None:
            optimizer.step()
            if allocate is not None:
                allocate(number)

        # PEFT's own forward goes past the model that adds AdaLoRA's penalty, where it is told no task.
        reached = train(theirs.base_model if allocate is not None else theirs, name, step)
    return Result(name, trained(made.module), ours, reached)


def fine_tuned() -> tuple[Result, float]:
    """Full fine-tuning of the eager model, and what it gave before."""
    made = compiled("bitfit", HEAD)
    model = classifier(made)
    before = accuracy(model)
    reached = train(model, "full fine-tuning", lambda optimizer, _: optimizer.step())
    return Result("full fine-tuning", trained(model), reached, None), before


def plot(found: list[Result]) -> None:
    """Accuracy against trained parameters, as a picture beside the page."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "adaptc"  # the same picture from the same numbers
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6))
    for result in found:
        axes.scatter(result.trained, 100 * result.ours, color="C0", s=22)
        axes.annotate(
            result.name,
            (result.trained, 100 * result.ours),
            xytext=(4, 3),
            textcoords="offset points",
            fontsize=8,
        )
    pairs = [(r.trained, 100 * r.theirs) for r in found if r.theirs is not None]
    axes.scatter(
        *zip(*pairs, strict=True), facecolors="none", edgecolors="C1", s=60, label="the same in PEFT"
    )
    axes.set_xscale("log")
    axes.set_xlabel("trained parameters, without the head")
    axes.set_ylabel(f"accuracy on SST-2 after {STEPS} steps, %")
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(PAGE.with_suffix(".svg"), metadata={"Date": None})


def main() -> None:
    """Run the methods that are named, or all, and write the page."""
    quiet()
    found = []
    for name in sys.argv[1:] or known():
        found.append(measure(name))
        print(found[-1].row, flush=True)
    if len(sys.argv) > 1:
        return
    whole, before = fine_tuned()
    found.append(whole)
    found.sort(key=lambda result: result.trained)
    head = "| method | trained | adaptc | PEFT | learning rate |\n|---|---|---|---|---|\n"
    PAGE.write_text(
        TEXT.format(
            machine=machine(),
            tests=len(rows("dev")),
            steps=STEPS,
            batch=BATCH,
            before=before,
            table=head + "\n".join(result.row for result in found),
        )
    )
    plot(found)


if __name__ == "__main__":
    main()
