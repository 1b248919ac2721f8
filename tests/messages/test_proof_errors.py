"""What a spec says of its proofs, and does not fit the model, is an error at its place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.messages.test_plan_errors import NET, refused

__all__ = ["refused"]
Refused = Callable[..., tuple[str, str]]
ENTRY = 'adapt:\n- {method: lora, target: "*.query", r: 2}\nemit: [{format: torch, path: out}]\n'
ROW = {"x": [0.5] * 16}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.jsonl", None, "rows.jsonl: no such file"),
        ("rows.csv", "x", "rows.csv: expected a .jsonl or a .safetensors file"),
        ("rows.jsonl", "", "there is no row of data"),
        ("rows.jsonl", json.dumps(ROW) + "\n{", "rows.jsonl:2: not JSON"),
        ("rows.jsonl", json.dumps({"y": 1.0}), "row 1 has y, expected x: float32[batch, 16]"),
        ("rows.jsonl", json.dumps({"x": [0.5] * 15}), "x has 15 along 16"),
        ("rows.safetensors", "no", "rows.safetensors"),
    ],
)
def test_rows_that_cannot_be_read(
    refused: Refused, tmp_path: Path, name: str, content: str | None, words: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    text, place = refused(NET + f"proof: {{inputs: {name}}}\n" + ENTRY, 2, "compile")
    assert words in text
    assert place.startswith("4:17")


def test_a_size_of_no_dimension(refused: Refused) -> None:
    text, place = refused(NET + "proof:\n  shapes:\n  - {batch: 2, seq: 3}\n" + ENTRY, 2, "compile")
    assert "the inputs have no dimension 'seq'" in text
    assert "they have batch" in text
    assert place.startswith("6:16")
