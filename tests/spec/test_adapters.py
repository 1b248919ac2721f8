"""The key `adapters` of a spec: alternatives by name, and what is said where it is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from adaptc.errors import SpecError
from adaptc.spec.spec import dump, load, schema

LORA = "[{method: lora, target: all-linear}]"


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "spec.yaml"
    path.write_text("version: 1\nbase: {model: ./base}\n" + text)
    return path


def test_alternatives_are_lists_of_entries_by_name(tmp_path: Path) -> None:
    text = """\
adapt: [{method: bitfit, target: "*"}]
adapters:
  alice: [{adapter: ./alice}]
  bob:
    - {method: ia3, target: all-linear}
    - {method: full, target: classifier, name: head}
"""
    spec = load(written(tmp_path, text))
    assert list(spec.adapters) == ["alice", "bob"]
    bob = spec.alternative("bob")
    assert [bob.place(index) for index in range(3)] == [
        ("adapt", 0),
        ("adapters", "bob", 0),
        ("adapters", "bob", 1),
    ]
    assert [entry.name for entry in bob.adapt] == ["default", "bob", "head"]
    assert spec.alternative("alice").default_name(1) == "alice"
    assert load(dump(spec)).adapters == spec.adapters


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adapters: [alice]", "3:11: adapters: expected a mapping of names to lists of entries, got"),
        ("adapters: {alice: []}", "3:19: adapters.alice: must not be empty: no adapter at all is the base"),
        (
            "adapters: {a b: " + LORA + "}",
            "3:12: adapters.a b: the name of an adapter has letters, digits, - and _",
        ),
        ("adapters:\n  a: " + LORA + "\n  a: " + LORA, "5:3: duplicate key 'a'"),
        (
            "adapters: {a: [{method: lorra, target: x}]}",
            "3:25: adapters.a.0.method: unknown method 'lorra'; did you",
        ),
        (
            "adapters: {a: [{method: lora, target: x, rank: 3}]}",
            "3:42: adapters.a.0.rank: unknown key 'rank'",
        ),
        ("adapters: {a: {method: lora, target: x}}", "3:15: adapters.a: expected a list"),
        ("adaptors: {a: " + LORA + "}", "3:1: adaptors: unknown key 'adaptors'; did you mean 'adapters'?"),
        (
            "adapters: {alice: "
            + LORA
            + "}\nemit: [{format: onnx-adapter, path: a.onnx_adapter, name: alise}]",
            "4:59: emit.0.name: unknown adapter 'alise'; did you mean 'alice'?",
        ),
        (
            "emit: [{format: onnx, path: a.onnx, adapters: swap}]",
            "3:47: emit.0.adapters: there are no `adapters:` to choose from; `adapt:` is always on",
        ),
    ],
)
def test_a_wrong_alternative_is_told_at_its_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SpecError) as error:
        load(written(tmp_path, text))
    assert f"spec.yaml:{message}" in str(error.value)


def test_the_schema_has_alternatives() -> None:
    keys = schema()["properties"]["adapters"]
    assert keys["additionalProperties"]["type"] == "array"
