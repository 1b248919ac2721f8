"""What decoders write in each way, beside what they write without a cache, and the page of it: docs/decoders.md."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.decoder_texts import NEW, Text

PAGE = Path(__file__).parents[1] / "docs/decoders.md"
KINDS = ("base", "LoRA folded", "LoRA live", "prefix", "int4")
"""How a decoder is adapted."""
WAYS = ("Hugging Face", "torch", "onnx standard", "onnx gqa", "genai")
"""The columns of the table."""
BOUND = 1e-4
"""The largest error of logits that counts as right, over the largest logit of the text."""
TEXT = """\
# Decoders

What a decoder writes with a cache is what it writes without one. Each continues three texts as one batch, of {lengths}
tokens, and the one of one token by itself, by {new} tokens, which is past the sliding window of those that have one
(4 tokens). A cell is the largest error of the logits of all steps, over the largest logit of the text, beside the graph
without a cache, which is run on the whole text for each token, each text alone. Every token is the same, unless the
cell says otherwise. *Hugging Face* is that graph beside transformers' `generate` on the eager model, with the adapter
by PEFT and, of int4, with the values that the bits stand for; of a decoder written by hand (`tests/decoders.py`) it is
the eager module. No error may be above {bound:.0e}.

Models of two layers with random weights, float32; LoRA on every linear layer, a prefix of 3 tokens, int4 with exact
products. In torch (`compiled.generate`) and in `attention: standard` shorter texts are padded in front, in
`attention: gqa` and in onnxruntime-genai behind; an encoder's always behind. {count} of {all} rows have been run. Made
by `python -m benchmarks.decoder_table` ({versions}).

{rows}

{notes}
"""


@dataclass(frozen=True)
class Cell:
    """What became of one way of writing.

    Attributes:
        same: the tokens that are those without a cache, up to the first other one of each text.
        tokens: how many were written; 0 where nothing was.
        error: the largest error of logits, over the largest logit of the text.
        refused: why it is not done, in adaptc's words.
        note: what else is to be known: another form of attention, texts one by one.
    """

    same: int = 0
    tokens: int = 0
    error: float = 0.0
    refused: str = ""
    note: str = ""

    @property
    def holds(self) -> bool:
        """Whether it is right, or refused in words."""
        return bool(self.refused) or (self.same == self.tokens and self.error <= BOUND)

    @property
    def shown(self) -> str:
        """The cell."""
        if self.refused:
            return "refused"
        if not self.tokens:
            return self.note
        error = f"{self.error:.0e}"
        return error if self.same == self.tokens else f"**{self.same} of {self.tokens} tokens**, {error}"


@dataclass(frozen=True)
class Outcome:
    """What became of a decoder with one adaptation.

    Attributes:
        name: of the decoder.
        kind: one of `KINDS`.
        cells: one of `WAYS` -> what became of it.
        crash: how the run ended before its end; "" if it did not.
    """

    name: str
    kind: str
    cells: Mapping[str, Cell] = field(default_factory=dict[str, Cell])
    crash: str = ""

    @property
    def holds(self) -> bool:
        """Whether every cell does."""
        return not self.crash and all(cell.holds for cell in self.cells.values())


def compared(want: Mapping[int, Text], got: Iterable[tuple[int, Text]], note: str = "") -> Cell:
    """Texts beside those without a cache, of the prompts of these numbers."""
    same = tokens = 0
    worst = 0.0
    for number, text in got:
        right = want[number]
        equal = [a == b for a, b in zip(right.tokens, text.tokens, strict=True)]
        count = equal.index(False) if False in equal else NEW
        end = min(count + 1, NEW)  # behind another token the texts differ
        difference = (right.logits[:end].double() - text.logits[:end].double()).abs().max()
        error = float(difference / right.logits.abs().max())
        worst = math.inf if math.isnan(error) else max(worst, error)
        same, tokens = same + count, tokens + NEW
    return Cell(same, tokens, worst, note=note)


def write(outcomes: Sequence[Outcome], names: Sequence[str], lengths: Sequence[int], versions: str) -> None:
    """Write docs/decoders.md, of the outcomes so far of the decoders of these names."""
    lines = ["| decoder | | " + " | ".join(WAYS) + " |", "|" + "---|" * (2 + len(WAYS))]
    for outcome in outcomes:
        cells = [outcome.cells[way].shown if way in outcome.cells else outcome.crash for way in WAYS]
        lines.append(f"| {outcome.name} | {outcome.kind} | " + " | ".join(cells) + " |")
    run = {(outcome.name, outcome.kind) for outcome in outcomes}
    left = {name: [kind for kind in KINDS if (name, kind) not in run] for name in names}
    said = ", ".join(map(str, lengths[:-1])) + f" and {lengths[-1]}"
    text = TEXT.format(
        lengths=said,
        new=NEW,
        count=len(outcomes),
        all=len(names) * len(KINDS),
        bound=BOUND,
        versions=versions,
        rows="\n".join(lines),
        notes="\n".join(_notes(outcomes, {name: kinds for name, kinds in left.items() if kinds})),
    )
    PAGE.write_text(text)


def _notes(outcomes: Sequence[Outcome], left: Mapping[str, Sequence[str]]) -> list[str]:
    """What is refused, what else is to be known, with the cells that each is about, and what has not been run."""
    refused = _by_words(outcomes, "refused")
    noted = _by_words(outcomes, "note")
    titles = {
        "Refused": [f"{where}: {words}" for words, where in refused.items()],
        "Written otherwise": [f"{where}: {words}" for words, where in noted.items()],
        "Not run": [f"{name}: {', '.join(kinds)}" for name, kinds in left.items()],
    }
    return [
        "\n".join([f"## {title}\n", *(f"- {x}" for x in lines), ""])
        for title, lines in titles.items()
        if lines
    ]


def _by_words(outcomes: Sequence[Outcome], what: str) -> dict[str, str]:
    """Words -> the cells that they are about."""
    found: dict[str, dict[str, dict[str, list[str]]]] = {}
    for outcome in outcomes:
        for way, cell in outcome.cells.items():
            words = re.sub(r"%\w+", "", getattr(cell, what)).strip(": ")
            if words:
                found.setdefault(words, {}).setdefault(way, {}).setdefault(outcome.name, []).append(
                    outcome.kind
                )
    return {
        words: "; ".join(
            f"{way}: "
            + ", ".join(
                n if len(kinds) == len(KINDS) else f"{n} ({', '.join(kinds)})" for n, kinds in of.items()
            )
            for way, of in ways.items()
        )
        for words, ways in found.items()
    }
