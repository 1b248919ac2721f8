"""The pages of the documentation, and the blocks of code in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.glob("*.md")), ROOT / "README.md"]
FENCE = re.compile(r'^```([\w-]*)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
RUN = {"python", "yaml", "sh", "console"}
SHOWN = {"text", "py"}
"""What is not run: outputs, errors, and code for what a test has not, such as a recording for Whisper."""


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        page: the file it is in.
        line: where it starts, counted from 1.
        language: what stands behind the fence.
        title: the file that the block is said to be, or "".
        text: its lines.
    """

    page: Path
    line: int
    language: str
    title: str
    text: str

    @property
    def place(self) -> str:
        """Where it is, as messages say it."""
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    """The blocks of a page, in order."""
    text = page.read_text()
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        yield Block(page, line, match[1], match[2] or "", match[3])


def masked(output: str) -> list[str]:
    """The lines of an output without what differs from run to run and machine to machine: numbers and widths."""
    number = re.compile(r"\b[0-9a-f]{12,}\b|\d[\d,]*(\.\d+)?(e[-+]\d+)?")
    lines = [number.sub("#", line) for line in output.splitlines()]
    return [re.sub(r"[━─═]+", "─", re.sub(r"\s+", " ", line)).strip() for line in lines if line.strip()]


def is_shown(expected: str, actual: str) -> bool:
    """Whether an output is what a page shows; there `…` stands for anything, and alone for any lines."""
    parts = []
    for line in masked(expected):
        words = ".*".join(re.escape(word) for word in line.split("…"))
        parts.append(r"(?:.*\n)*" if line == "…" else f"{words}\n")
    return re.fullmatch("".join(parts), "".join(f"{line}\n" for line in masked(actual))) is not None
