"""What became of a case of an operation, and the page that tells it of all: docs/operations.md."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

PAGE = Path(__file__).parents[1] / "docs/operations.md"
KINDS = ("dynamic", "fixed", "core")
"""The ways to run a case: with a dynamic axis, with fixed sizes, and with fixed sizes in torch's core operations."""
RUN_ELSEWHERE = "its core operations are in other cases"
"""Why a case of the kind `core` is not run."""
TEXT = """\
# Operations

Torch's own operations, each in a module around a linear layer that has an adapter, with the inputs that torch tests
it with (`torch.testing`, float32, up to two calls of each). adaptc exports the module and proves the program; then it
is run in ONNX Runtime and compared with PyTorch on other inputs, beside the program that `torch.onnx.export` alone
makes of the same module. *Right* is an error of at most {bound:.0e} of the largest value. Made by
`python -m benchmarks.operations` ({versions}).

| | right in adaptc | right in the exporter alone |
|---|---|---|
{counts}

## Refused, or right in one of the two only

What is the same in every call of an operation is one row. The words are the first line of adaptc's error.

| operation | kind | adaptc | exporter alone |
|---|---|---|---|
{rows}

## Right in adaptc in every call

{right}

## Not run

PyTorch itself does not run these in such a module: they draw random numbers, give no tensor, or take other inputs.

{unusable}

## Core operations

Of torch's {core} core operations these {reached} are in a case that is right, as they are or in what torch makes of
others: {reached_names}

In no case: {missing}. Those that end in `_backward` are of training, `rand` and the like draw random numbers, `sym_`
are sizes, and the rest have no call in torch's database.
"""


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Attributes:
        name: of the operation.
        number: of the call.
        kind: one of `KINDS`.
        adaptc: `right`, or `refused`, `wrong` or `crash` with words; "" where PyTorch itself does not run it.
        exporter: the same of torch's exporter alone.
        unusable: why PyTorch does not run it.
        core: the core operations that the case runs, of the kind `core`.
    """

    name: str
    number: int
    kind: str
    adaptc: str = ""
    exporter: str = ""
    unusable: str = ""
    core: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, int, str]:
        """What names it."""
        return self.name, self.number, self.kind

    @property
    def holds(self) -> bool:
        """Whether adaptc is right, or refuses in words what the exporter alone gets no better."""
        if self.key in EXCEPTIONS:
            return True
        refused = self.adaptc.startswith("refused: ") and self.exporter != "right"
        return self.adaptc in ("", "right") or refused


EXCEPTIONS: Mapping[tuple[str, int, str], str] = {
    ("lu_unpack", 0, "dynamic"): "torch itself reads beyond the pivots, whose number stays",
    (
        "_chunk_cat",
        0,
        "dynamic",
    ): "torch pads by another operation at an odd size; the exporter's padding fits both",
}
"""Outcomes that do not hold, and why that is right."""


def write(outcomes: Sequence[Outcome], bound: float, versions: str) -> None:
    """Write docs/operations.md."""
    core = {name for outcome in outcomes if outcome.adaptc == "right" for name in outcome.core}
    every = core_operations()
    PAGE.write_text(
        TEXT.format(
            bound=bound,
            versions=versions,
            counts="\n".join(_counts(outcomes)),
            rows="\n".join(_rows(outcomes)),
            right=_listed({o.name for o in outcomes} - {o.name for o in outcomes if o.adaptc != "right"}),
            unusable="\n".join(_unusable(outcomes)),
            core=len(every),
            reached=len(core & every),
            reached_names=_listed(core & every),
            missing=_listed(every - core),
        )
    )


def core_operations() -> set[str]:
    """The names of torch's core operations, each with its overload."""
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::")]
    overloads = [getattr(torch.ops.aten, name.split("::")[1].split(".")[0], None) for name in names]
    return {
        str(getattr(packet, overload))
        for packet in overloads
        if packet is not None
        for overload in packet.overloads()
        if torch.Tag.core in getattr(packet, overload).tags
    }


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


def _counts(outcomes: Sequence[Outcome]) -> list[str]:
    """A row for every kind: how many modules are right, of how many."""
    lines: list[str] = []
    for kind, text in zip(KINDS, ("a dynamic axis", "fixed sizes", "in core operations"), strict=True):
        run = [outcome for outcome in outcomes if outcome.kind == kind and outcome.adaptc]
        ours, alone = (sum(getattr(o, by) == "right" for o in run) for by in ("adaptc", "exporter"))
        lines.append(f"| {text} | {ours} of {len(run)} | {alone} of {len(run)} |")
    return lines


def _rows(outcomes: Sequence[Outcome]) -> list[str]:
    """A row for all that is not right in both, equal ones once."""
    kinds: dict[tuple[str, str, str], list[str]] = {}
    for outcome in outcomes:
        if outcome.adaptc and (outcome.adaptc, outcome.exporter) != ("right", "right"):
            cells = outcome.name, _words(outcome.adaptc), _words(outcome.exporter)
            kinds.setdefault(cells, []).append(outcome.kind)
    return [
        f"| `{name}` | {', '.join(kind for kind in KINDS if kind in found)} | {ours} | {alone} |"
        for (name, ours, alone), found in sorted(kinds.items())
    ]


def _words(text: str) -> str:
    """The first line of an outcome, without what differs from run to run."""
    line = text.split("\n")[0].replace("|", "\\|")
    return re.sub(r"largest error [\de.+-]+", "an error", re.sub(r"by [\de.+-]+$", "", line))[:200].strip(
        ": "
    )


def _unusable(outcomes: Sequence[Outcome]) -> list[str]:
    """A line for every reason why operations are not run in any way."""
    run = {outcome.name for outcome in outcomes if outcome.adaptc}
    reasons: dict[str, set[str]] = {}
    for outcome in outcomes:
        if outcome.name not in run and outcome.kind == "fixed":
            reasons.setdefault(outcome.unusable, set()).add(outcome.name)
    common = Counter({reason: len(names) for reason, names in reasons.items()}).most_common()
    return [f"- {reason}: {_listed(reasons[reason])}" for reason, _ in common]
