"""A plan tells how attention is computed in each ONNX program, as the manifest does afterwards."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from adaptc.compiler.driver import plan
from adaptc.errors import SpecError
from tests.families import Zoo, entry, perturb


def told(
    zoo: Zoo, name: str, method: str = "lora", options: Mapping[str, Any] | None = None, **emit: Any
) -> list[str]:
    """What the plan says of attention."""
    spec = {"base": zoo.base_of(name), "adapt": [entry(method, name, **(options or {}))]}
    written = {"format": "onnx", "path": "build/model.onnx", **emit}
    notes = plan(spec | {"emit": [written]})[1].notes
    return [note.removeprefix("emit.0: ") for note in notes if note.startswith("emit.0: ")]


def test_the_default_is_told(zoo: Zoo) -> None:
    assert told(zoo, "llama", cache=True) == ["attention: 2 by Attention"]


@pytest.mark.slow
def test_each_form_is_told(zoo: Zoo) -> None:
    assert told(zoo, "llama", cache=True, attention="gqa") == ["attention: 2 by GroupQueryAttention"]
    assert told(zoo, "llama", cache=True, attention="plain") == []
    assert told(zoo, "llama") == []
    assert told(zoo, "llama", cache=True, opset=20) == [
        "attention stays in plain operations: ONNX has Attention since opset 23, and this entry asks for 20; leave "
        "`opset` out for it"
    ]
    assert told(zoo, "llama", format="genai", path="build/serve") == ["attention: 2 by GroupQueryAttention"]


@pytest.mark.slow
def test_what_stays_plain_is_told_with_its_place(zoo: Zoo) -> None:
    first, *why = told(zoo, "bart", cache=True, attention="gqa")
    assert first == "attention: 2 by GroupQueryAttention, 2 by Attention"
    assert len(why) == 2
    assert "its keys are not those of the past and the new tokens alone" in why[0]
    assert "modeling_bart.py:" in why[0]
    first, *why = told(zoo, "bart", cache=True, attention="gqa", opset=21)
    assert first == "attention: 2 by GroupQueryAttention, 2 by plain operations"


@pytest.mark.slow
@pytest.mark.parametrize("form", ["standard", "gqa"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "bart"])
def test_the_manifest_counts_the_same(zoo: Zoo, tmp_path: Path, name: str, form: str) -> None:
    compiled = zoo.compiled(name, [entry("lora", name)])
    perturb(compiled.module)
    compiled.emit("onnx", tmp_path / "model.onnx", cache=True, attention=form)
    product = json.loads((tmp_path / "manifest.json").read_text())["products"]["model.onnx"]
    first, *why = told(zoo, name, cache=True, attention=form)
    names = {"gqa": "GroupQueryAttention", "standard": "Attention", "plain": "plain operations"}
    counts = [
        f"{product['attention'][form]} by {text}"
        for form, text in names.items()
        if product["attention"][form]
    ]
    assert first == "attention: " + ", ".join(counts)
    assert len(why) == len(product["attention"]["why"])


@pytest.mark.slow
def test_a_model_that_writes_into_its_tensors_is_told_later(zoo: Zoo) -> None:
    assert told(zoo, "t5", cache=True) == [
        "how attention is computed is told when it is compiled: the model writes into its tensors"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_why_a_program_with_virtual_tokens_has_another_operation(zoo: Zoo, method: str) -> None:
    first, *why = told(zoo, "llama", method, cache=True, attention="gqa")
    assert first == "attention: 2 by Attention"
    assert len(why) == 2
    assert (
        "virtual tokens are in front of its past, and it takes several tokens behind a past of one row"
        in why[0]
    )


@pytest.mark.parametrize(
    ("emit", "place"),
    [({"cache": True}, "emit.0.cache"), ({"format": "genai", "path": "serve"}, "emit.0.format")],
)
def test_virtual_tokens_among_real_ones_are_refused_by_the_plan(
    zoo: Zoo, emit: dict[str, Any], place: str
) -> None:
    with pytest.raises(
        SpecError, match=f"{place}: virtual tokens at given positions stand behind real"
    ) as caught:
        told(zoo, "llama", "p-tuning", {"positions": [0, 2, 4]}, **emit)
    assert "leave `positions` out, or emit without a cache" in str(caught.value)
    assert told(zoo, "llama", "p-tuning", {"positions": [0, 2, 4]}) == []
