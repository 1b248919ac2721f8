"""The table of methods: what each is, what it costs, and what was shown of it by running.

`python -m benchmarks.methods` writes docs/methods.md; with names of methods it prints their rows only. It ends with
exit code 1 if something does not hold.
"""

from __future__ import annotations

import inspect
import re
import statistics
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import adaptc
from adaptc.emit.onnx.runtime import onnx_runner
from adaptc.ir.cost import flops
from adaptc.methods.method import METHODS, WeightMethod, summary
from benchmarks.field import HEAD, ROOT, batches, compiled, from_entries, known, peft_model, trained
from benchmarks.process import quiet
from benchmarks.table import BOUND, error

PAGE = ROOT / "docs/methods.md"
STEPS, ROWS = 12, 16
TEXT = """\
# Methods

Made by `python -m benchmarks.methods` ({versions}), on the real all-MiniLM-L6-v2 with a
new classifier head, float32, with the options of `benchmarks/field.py`. Each is one file in `passes/insert/`: median
{median} lines, the longest {longest}.

## What each is

`trained` is the share of the base's numbers that is trained, `live` what the adapter adds to the base's
multiplications where it is not folded, `folded` what is left of that: most fold into the base's own operations and
are gone; of what is inserted into activations, attentions and inputs the weights that make it are gone, and it
stays. ONNX takes all, folded or live.

{about}

## What was shown

At the start: the largest difference from the base, over its largest output ("else": it says that it starts
elsewhere). Loss: before and after {steps} steps of AdamW on reviews. Gradient: that what is trained has one, and
nothing else. Then the largest error over the largest expected value, with every tensor random: of the folded module
against the live one, of ONNX Runtime live and folded, of what a checkpoint gives back, of an adapter that PEFT wrote
and of one that PEFT reads, against PEFT's own outputs. No error may be above {bound:.1e}.

{shown}
"""


@dataclass(frozen=True)
class Row:
    """What was found of one method."""

    name: str
    about: tuple[str, ...]
    shown: tuple[str, ...]
    worst: float
    holds: bool


def examine(name: str) -> Row:
    """Compile, train, fold, export, save and read one method, beside PEFT where it has it."""
    torch.manual_seed(0)
    cls = METHODS[name]
    alone = cls.peft is not None and not cls.peft.hosts and not cls.peft.heads  # there is no place for a head
    made = compiled(name, *([] if alone else [HEAD]))
    data = list(batches(STEPS + 2, ROWS, seed=1))
    check, module = data[-1], made.module
    module.eval()
    start = error(_base(made, check), _logits(module, check))
    own = {n for n, p in module.named_parameters() if p.requires_grad}
    losses, gradient = _train(module, data[:STEPS], own)
    _perturb(module)
    errors = _errors(made, check)
    errors |= _peft_errors(made, check)
    source = Path(inspect.getsourcefile(cls) or "")
    plan, format = made.plan.budget, cls.peft
    sites = [a for a in made.graph.adaptations if a.method.name == name]
    added = plan.added_flops / plan.base_flops
    about = (
        f"`{name}`",
        ", ".join(sorted(cls.kinds)),
        f"`{re.split(r' {4,}', summary(cls))[0]}`",
        f"{trained(module) / plan.parameters:.3%}",
        f"{len(sites)}",
        f"+{added:.1%}" if added > 0 else "weights only",
        _left(made, name),
        "reads and writes" if format and format.type else "as `modules_to_save`" if format else "no",
        f"{len(source.read_text().splitlines())}",
    )
    starts = cls.identity_at_init
    worst = max((e for e in errors.values() if e is not None), default=0.0)
    falls = losses[-1] < losses[0]
    shown = (
        f"`{name}`",
        f"{start:.0e}" if starts else "else",
        f"{losses[0]:.2f} to {losses[-1]:.2f}",
        "yes" if gradient else "NO",
        *("-" if e is None else f"{e:.0e}" for e in errors.values()),
    )
    return Row(name, about, shown, worst, falls and gradient and (not starts or start < BOUND))


def _left(made: adaptc.Compiled, name: str) -> str:
    """What folding leaves of a method."""
    folded = made.folded_graph()
    if not any(a.method.name == name for a in folded.adaptations) and issubclass(METHODS[name], WeightMethod):
        return "gone"
    return f"stays, +{flops(folded) / made.plan.budget.base_flops - 1:.1%}"


def _train(module: Any, data: list[Any], own: set[str]) -> tuple[list[float], bool]:
    """The losses on the first batch before and after a step on each; whether gradients are where they belong."""
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=2e-3)
    step, gradient = adaptc.TrainingStep(module, steps=10 * len(data)), True
    with torch.no_grad():
        losses = [float(module(**data[0])["loss"])]
    for batch in data:
        module(**batch)["loss"].backward()
        found = {n for n, p in module.named_parameters() if p.grad is not None}
        gradient = gradient and found == own
        step(optimizer)
        optimizer.zero_grad()
    with torch.no_grad():
        return [*losses, float(module(**data[0])["loss"])], gradient


def _errors(made: adaptc.Compiled, check: dict[str, torch.Tensor]) -> dict[str, float | None]:
    module = made.module.eval()
    want = _logits(module, check)
    feeds = {name: check[name] for name in ("input_ids", "attention_mask")}
    found: dict[str, float | None] = {"fold": error(want, _logits(made.fold(), check))}
    with tempfile.TemporaryDirectory() as work:
        for how in ("live", "folded"):
            path = Path(work) / f"{how}.onnx"
            made.emit("onnx", path, adapters=how)
            found[f"onnx {how}"] = error(want, onnx_runner(path)(feeds)[0])
        made.save_adapter(Path(work) / "adapter")
        again = from_entries([{"adapter": str(Path(work) / "adapter")}])
        found["saved"] = error(want, _logits(again.module.eval(), check))
    return found


def _peft_errors(made: adaptc.Compiled, check: dict[str, torch.Tensor]) -> dict[str, float | None]:
    theirs = peft_model(made, trainable=False)
    if theirs is None:
        return {"from peft": None, "to peft": None}
    to_peft = error(_logits(theirs.eval(), check), _logits(made.module.eval(), check))
    theirs = peft_model(made).eval()
    _perturb(theirs, seed=2)
    with tempfile.TemporaryDirectory() as work:
        theirs.save_pretrained(work)
        ours = from_entries([{"adapter": work}])
        return {
            "from peft": error(_logits(theirs, check), _logits(ours.module.eval(), check)),
            "to peft": to_peft,
        }


def _perturb(module: Any, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def _base(made: adaptc.Compiled, check: dict[str, torch.Tensor]) -> torch.Tensor:
    return _logits(adaptc.bind(made.base).eval(), check)


def _logits(module: Any, check: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return module(**check)["logits"]


def table(columns: tuple[str, ...], found: list[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    lines = [columns, ("---",) * len(columns), *found]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Run the methods that are named, or all, and write the page."""
    quiet()
    found = []
    for name in sys.argv[1:] or known():
        found.append(examine(name))
        print(" | ".join(found[-1].shown), flush=True)
    about = ("method", "sits on", "equation", "trained", "sites", "live", "folded", "PEFT", "lines")
    shown = (
        *("method", "at the start", "loss", "gradient", "fold", "ONNX live", "ONNX folded"),
        *("saved and loaded", "PEFT's, here", "ours, in PEFT"),
    )
    lines = [int(row.about[-1]) for row in found]
    text = TEXT.format(
        versions=", ".join(f"{p} {version(p)}" for p in ("torch", "transformers", "peft", "onnxruntime")),
        median=int(statistics.median(lines)),
        longest=max(lines),
        about=table(about, [row.about for row in found]),
        shown=table(shown, [row.shown for row in found]),
        steps=STEPS,
        bound=BOUND,
    )
    if len(sys.argv) == 1:
        PAGE.write_text(text)
    broken = [row.name for row in found if row.worst > BOUND or not row.holds]
    if broken:
        sys.exit(f"does not hold: {', '.join(broken)}")


if __name__ == "__main__":
    main()
