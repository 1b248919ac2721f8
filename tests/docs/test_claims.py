"""What pages say of the code is so: messages are those that adaptc gives, numbers those that were measured."""

from __future__ import annotations

import ast
import re
from functools import cache

from tests.docs.pages import DOCS, ROOT

ROW = re.compile(r"^\| `([^`]+)` \|", re.MULTILINE)


@cache
def texts() -> str:
    """Every literal text in the source, joined as Python joins those that stand side by side."""
    literals = []
    for folder in ("adaptc", "passes"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    literals.append(node.value)
    return "\n".join(literals)


def test_messages_are_given() -> None:
    messages = ROW.findall((DOCS / "troubleshooting.md").read_text())
    assert len(messages) > 50
    pieces = {piece.strip() for message in messages for piece in message.split("…") if piece.strip()}
    assert not {piece for piece in pieces if piece not in texts()}


def test_measured_numbers_are_those_of_the_benchmarks() -> None:
    text = (DOCS / "comparison.md").read_text().partition("## Measured")[2]
    measured = (ROOT / "benchmarks/results.md").read_text()
    numbers = set(re.findall(r"\| (\d\.\d+)(?= \|)", text))
    assert len(numbers) > 10
    assert not {number for number in numbers if f"| {number} |" not in measured}
