"""What can have no cache, or is not served, is refused by a plan at its place in the spec, with the model's line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.command_line import Ran

SPEC = """
    base: {{model: {base}{task}}}
    emit:
      - {entry}
"""
NOT_A_DECODER = {
    "a cache of an encoder": (
        "",
        "{format: onnx, path: m.onnx, cache: true}",
        "5:41: emit.0.cache: this model can have no cache",
        ("it takes one of the tokens, by its place", "modeling_bert.py:"),
    ),
    "a classifier in onnxruntime-genai": (
        ", task: sequence-classification",
        "{format: genai, path: serve}",
        "5:14: emit.0.format: onnxruntime-genai needs logits (batch, tokens, vocabulary) of every token",
        ("emit onnx: ONNX Runtime runs it", "task: causal-lm"),
    ),
}


@pytest.mark.parametrize("name", NOT_A_DECODER)
def test_what_is_no_decoder(
    cli: Callable[..., Ran], write: Callable[[str], Path], bert: Path, name: str
) -> None:
    task, entry, says, more = NOT_A_DECODER[name]
    ran = cli("plan", write(SPEC.format(base=bert, task=task, entry=entry)))
    assert ran.code == 2
    assert f"spec.yaml:{says}" in ran.err
    for words in more:
        assert words in ran.err
