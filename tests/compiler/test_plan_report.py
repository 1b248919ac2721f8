"""A pipeline as `adaptc plan` prints it is a spec's `passes`: pasted, it gives the same pipeline."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
from rich.console import Console

from adaptc.cli.screen import Screen
from adaptc.compiler.plan.plan import make_plan
from adaptc.compiler.plan.report import PlanReport, plan_report
from adaptc.compiler.rewrite import rewrite
from adaptc.rewriter.pipeline import Pass
from adaptc.spec.spec import load
from adaptc.spec.yaml_text import YamlText
from tests.families import Zoo

LORA = {"method": "lora", "target": "up", "r": 2}
IA3 = {"method": "ia3", "target": "down"}
INT4 = {"method": "int4", "target": "mid"}


def planned(zoo: Zoo, spec: dict[str, Any], *overrides: str) -> tuple[PlanReport, str]:
    """What is reported of a plan, and the text of the graph that it gives."""
    loaded, graph = load(spec, overrides), zoo.graph("mlp")
    plan = make_plan(loaded, graph)
    rewritten = rewrite(loaded, graph, plan)
    return plan_report(loaded, graph, plan, rewritten), rewritten.adapted.text()


def printed(plan: PlanReport, capsys: pytest.CaptureFixture[str]) -> str:
    """What stands behind `passes:` where a plan is shown."""
    screen = Screen()
    screen.out = Console(highlight=False, soft_wrap=True)
    screen.plan(plan)
    (line,) = re.findall(r"^passes: +(.*)$", capsys.readouterr().out, re.MULTILINE)
    return line


def described(passes: Sequence[Pass]) -> list[tuple[str, dict[str, Any]]]:
    return [(item.name, item.stated()) for item in passes]


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ({"adapt": [LORA, IA3]}, "[insert]"),
        ({"adapt": [LORA], "quantize": [INT4]}, "[quantize, insert]"),
        ({"quantize": [INT4, {**INT4, "target": "up"}]}, "[quantize]"),
        ({"adapt": []}, "[]"),
        (
            {"adapt": [LORA, IA3], "passes": ["insert", {"factor": {"tokens": 64}}]},
            "[insert, {factor: {tokens: 64}}]",
        ),
        ({"adapt": [LORA], "passes": ["insert", {"factor": {"tokens": 1024}}]}, "[insert, factor]"),
        (
            {"adapt": [LORA], "quantize": [INT4], "passes": ["quantize", "insert", "fold", "quantize"]},
            "[quantize, insert, fold, quantize]",
        ),
        (
            {
                "adapt": [LORA],
                "passes": ["insert", {"gradient-checkpointing": {"segments": 2}}, {"torch-kernels": {}}],
            },
            "[insert, {gradient-checkpointing: {segments: 2}}, torch-kernels]",
        ),
        (
            {"passes": [{"insert-lora": {"target": ["re:up|down"], "r": 4, "dropout": 1e-5}}, "fold"]},
            '[{insert-lora: {target: ["re:up|down"], r: 4, dropout: 1e-05}}, fold]',
        ),
    ],
)
def test_what_is_printed(
    zoo: Zoo, capsys: pytest.CaptureFixture[str], spec: dict[str, Any], text: str
) -> None:
    plan, adapted = planned(zoo, spec)
    line = printed(plan, capsys)
    assert line == text
    assert plan.to_json()["passes"] == YamlText("", line).read()
    again, twin = planned(zoo, spec, f"passes={line}")
    assert described(again.passes) == described(plan.passes)
    assert twin == adapted


def test_a_plan_is_printed_as_text(zoo: Zoo, capsys: pytest.CaptureFixture[str]) -> None:
    plan, _ = planned(zoo, {"adapt": [LORA, IA3], "quantize": [INT4]})
    lines = str(plan).splitlines()
    assert lines[:3] == [
        "adapt.0     lora 'default': 1 site, up",
        "adapt.1     ia3 'default': 1 site, down",
        "quantize.0  int4: 1 site, mid",
    ]
    assert lines[3].startswith(f"parameters  {plan.budget.parameters:,} in the base")
    Screen().plan(plan)
    assert capsys.readouterr().out.endswith("\n".join(lines[3:]) + "\n"), "as `adaptc plan` prints it"
