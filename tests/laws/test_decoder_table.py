"""docs/decoders.md has every family that writes texts, and nothing wrong; what another text is, the table tells."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

pytest.importorskip("peft")
from benchmarks.bases import families
from benchmarks.decoder_models import TASKS, by_hand, model, names
from benchmarks.decoder_outcomes import KINDS, PAGE, WAYS, compared
from benchmarks.decoder_table import outcomes
from benchmarks.decoder_texts import NEW, Text
from tests.decoders import BY_HAND
from tests.families import DECODERS, FAMILIES


def test_the_page_has_every_decoder_and_nothing_wrong() -> None:
    text = PAGE.read_text()
    table = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    cells = {(name, kind): rest for name, kind, *rest in table[1:]}
    left = {
        (name, kind)
        for name, kinds in re.findall(r"^- (.+): (.+)$", text.partition("## Not run\n")[2], re.MULTILINE)
        for kind in kinds.split(", ")
    }
    assert cells.keys() | left == {(name, kind) for name in names() for kind in KINDS}
    assert not cells.keys() & left
    assert [row for row, ways in cells.items() if len(ways) != len(WAYS)] == []
    assert [row for row, ways in cells.items() if any("**" in way or "crash" in way for way in ways)] == []


def test_the_decoders_are_those_of_the_registries() -> None:
    written = {name.lower().replace("-", "") for name in names()}
    assert {name for name, family in FAMILIES.items() if family.task in TASKS} <= written
    assert set(DECODERS) <= written
    assert {by_hand(name) for name in BY_HAND} <= set(names())
    assert {name for name, family in families().items() if family.task in TASKS} <= set(names())


def test_another_token_and_another_logit_are_told() -> None:
    logits = torch.randn(NEW, 9, generator=torch.Generator().manual_seed(0))
    right = Text(logits.argmax(-1).tolist(), logits)
    assert compared({0: right}, [(0, right)]).shown == "0e+00"
    other = replace(right, tokens=[*right.tokens[:60], (right.tokens[60] + 1) % 9, *right.tokens[61:]])
    cell = compared({0: right, 1: right}, [(0, right), (1, other)])
    assert (cell.same, cell.tokens, cell.holds) == (160, 200, False)
    assert cell.shown.startswith("**160 of 200 tokens**")
    moved = compared({0: right}, [(0, replace(right, logits=logits + 0.01))])
    assert (moved.same, moved.holds) == (NEW, False)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GPT-2", by_hand("Einsum")])
def test_a_sample_of_the_table_holds(name: str) -> None:
    results = list(outcomes(model(name), ["LoRA folded", "prefix"]))
    assert [result.kind for result in results] == ["LoRA folded", "prefix"]
    assert [result for result in results if not result.holds] == []
