"""What became of a model type of transformers, and the page that tells it of all: docs/model_types.md."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs/model_types.md"
TEXT = """\
# Model types of transformers

A tiny random model of every type that transformers' `AutoModel` makes, its configuration shrunk by rules
(`benchmarks/tiny.py`), its head that of the type's most telling task, its inputs as adaptc derives them. A LoRA adapter
with random weights is on every linear layer. *Right*: the trainable module, the folded model and the ONNX program in
ONNX Runtime equal PEFT on the eager model, at other sizes than traced, within {bound:.0e} of the largest value of each
output. Where PEFT adapts no such parameters, the eager model has the folded weights. {number} of {all} types have been
run. Made by `python -m benchmarks.model_types` ({versions}).

{counts}

## Not right

The words are the first line of adaptc's error. `torch.export` and `torch.onnx.export` are run on the same model with
the same inputs and dynamic dimensions.

{rows}

## Not run

{unusable}

## Right

{right}
"""


@dataclass(frozen=True)
class Outcome:
    """What became of a model type.

    Attributes:
        name: the model type.
        task: the task that its model was made for.
        inputs: the inputs that were derived.
        adaptc: `right`, or `refused`, `wrong` or `crash` with words; "" where there is no model to run.
        export: `right`, or `refused` with words, of `torch.export` alone; "" where it was not run.
        exporter: the same of `torch.onnx.export` alone.
        unusable: why there is no tiny model of this type, or why it does not run.
        seconds: how long it took.
    """

    name: str
    task: str = ""
    inputs: tuple[str, ...] = ()
    adaptc: str = ""
    export: str = ""
    exporter: str = ""
    unusable: str = ""
    seconds: float = 0.0

    @property
    def holds(self) -> bool:
        """Whether adaptc is right, or refuses in words."""
        return self.adaptc in ("", "right") or self.adaptc.startswith("refused: ")

    @property
    def taken(self) -> bool:
        """Whether `torch.export` takes it, alone or in adaptc."""
        return "right" in (self.adaptc, self.export) or self.adaptc.startswith("wrong")


MODALITIES: Sequence[tuple[str, Callable[[set[str]], bool]]] = (
    ("text and images", lambda names: {"input_ids", "pixel_values"} <= names),
    ("text", lambda names: "input_ids" in names),
    ("images", lambda names: "pixel_values" in names),
    ("sound", lambda names: bool(names & {"input_values", "input_features"})),
    ("other", lambda names: True),
)
"""The kinds of models by their inputs; the first that fits."""


def write(outcomes: Sequence[Outcome], total: int, bound: float, versions: str) -> None:
    """Write docs/model_types.md, of the outcomes so far among a total of types."""
    outcomes = sorted(outcomes, key=lambda outcome: outcome.name)
    PAGE.write_text(
        TEXT.format(
            bound=bound,
            number=len(outcomes),
            all=total,
            versions=versions,
            counts="\n".join(_counts(outcomes)),
            rows="\n".join(_rows(outcomes)),
            unusable="\n".join(_unusable(outcomes)),
            right=", ".join(f"`{outcome.name}`" for outcome in outcomes if outcome.adaptc == "right"),
        )
    )


def _modality(outcome: Outcome) -> str:
    return next(name for name, fits in MODALITIES if fits(set(outcome.inputs)))


def _counts(outcomes: Sequence[Outcome]) -> list[str]:
    """A table: for every kind of inputs how many types are right, of those that can be run."""
    lines = [
        "| inputs | types run | torch.export takes | right in adaptc | share of those taken |",
        "|---|---|---|---|---|",
    ]
    run = [outcome for outcome in outcomes if outcome.adaptc]
    for name in ("all", *(name for name, _ in MODALITIES)):
        rows = [outcome for outcome in run if name in ("all", _modality(outcome))]
        right, taken = (
            sum(check) for check in ((o.adaptc == "right" for o in rows), (o.taken for o in rows))
        )
        share = f"{right / taken:.0%}" if taken else ""
        lines.append(f"| {name} | {len(rows)} | {taken} | {right} | {share} |")
    return lines


def _rows(outcomes: Sequence[Outcome]) -> list[str]:
    """A table of those that are not right."""
    lines = ["| type | task | adaptc | torch.export | torch.onnx.export |", "|---|---|---|---|---|"]
    for o in outcomes:
        if o.adaptc not in ("", "right"):
            words = (o.adaptc, o.export, o.exporter)
            lines.append(f"| `{o.name}` | {o.task} | {' | '.join(map(_words, words))} |")
    return lines


def _words(text: str) -> str:
    """The first line of an outcome, without what differs from run to run."""
    line = text.split("\n")[0].replace("|", "\\|").replace("](", "]\\(")
    return re.sub(r"largest error [\d.e+-]+|by [\d.e+-]+$", "by an error", line)[:240].strip(": ")


def _unusable(outcomes: Sequence[Outcome]) -> list[str]:
    """A line for every reason why types are not run."""
    reasons: dict[str, list[str]] = {}
    for outcome in outcomes:
        if not outcome.adaptc:
            reasons.setdefault(_words(outcome.unusable), []).append(f"`{outcome.name}`")
    common = Counter({reason: len(names) for reason, names in reasons.items()}).most_common()
    return [f"- {reason}: {', '.join(reasons[reason])}" for reason, _ in common]
