"""The JSON Schema says what `load` accepts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from adaptc.methods.method import METHODS
from adaptc.spec.source import Source
from adaptc.spec.spec import schema

SPECS = Path(__file__).parents[2] / "specs"
GOOD = {
    "version": 1,
    "base": {"model": "m", "dtype": "float16"},
    "inputs": {"x": "int64[batch, 3]"},
    "adapt": [
        {"method": "lora", "target": "all-linear", "r": 4, "lora_alpha": 8},
        {"method": "ia3", "target": {"layers": "0-3"}, "feedforward": ["*.down"]},
        {"adapter": "./a"},
    ],
    "emit": [{"format": "onnx", "path": "x", "opset": 20}],
    "passes": ["a", {"b": {"c": 1}}],
}


def definition(name: str) -> dict[str, Any]:
    return schema()["$defs"][name]


def test_the_kept_schema_is_up_to_date() -> None:
    code = "from adaptc.spec.spec import schema_text; print(schema_text(), end='')"
    # A fresh process: other tests register methods of their own in this one.
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert (SPECS / "schema.json").read_text() == fresh, "run: adaptc schema > specs/schema.json"


def test_it_names_itself() -> None:
    assert schema()["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema()["$id"] == "urn:adaptc:spec:1"
    assert schema()["required"] == ["version"]
    assert schema()["additionalProperties"] is False


def test_entries_are_told_apart_by_method() -> None:
    methods, adapter, combined = schema()["properties"]["adapt"]["items"]["anyOf"]
    assert set(methods["discriminator"]["mapping"]) == set(METHODS)
    assert adapter == {"$ref": "#/$defs/AdapterEntry"}
    assert combined == {"$ref": "#/$defs/CombineEntry"}
    assert definition("LoraEntry")["properties"]["method"]["const"] == "lora"


def test_every_option_says_what_it_is() -> None:
    for name, each in {"spec": schema(), **schema()["$defs"]}.items():
        for key, option in each.get("properties", {}).items():
            text = json.dumps(option)
            assert "const" in option or '"description"' in text or "$ref" in text, f"{name}: {key}"


def test_options_have_limits_defaults_and_words() -> None:
    lora = definition("LoraEntry")
    assert lora["description"].startswith("W' = W + (alpha / r) B A")
    assert lora["properties"]["r"] == {
        "default": 8,
        "description": "rank of the low-rank product",
        "exclusiveMinimum": 0,
        "title": "R",
        "type": "integer",
    }
    assert lora["properties"]["lora_alpha"]["description"] == "another spelling of alpha"
    assert lora["required"] == ["method", "target"]


def test_emits_are_told_apart_by_format() -> None:
    assert set(schema()["properties"]["emit"]["items"]["discriminator"]["mapping"]) == {
        "genai",
        "hf",
        "onnx",
        "onnx-adapter",
        "peft",
        "torch",
    }


def test_it_accepts_and_refuses_what_load_does() -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    validator = jsonschema.Draft202012Validator(schema())
    jsonschema.Draft202012Validator.check_schema(schema())
    validator.validate(GOOD)
    bad = [
        {},
        {"version": 2},
        {"version": 1, "adpt": []},
        {"version": 1, "adapt": [{"method": "lorra", "target": "x"}]},
        {"version": 1, "adapt": [{"method": "lora"}]},
        {"version": 1, "adapt": [{"method": "lora", "target": "x", "r": 0}]},
        {"version": 1, "adapt": [{"method": "lora", "target": "x", "r": "8"}]},
        {"version": 1, "adapt": [{"method": "ia3", "target": "x", "r": 8}]},
        {"version": 1, "adapt": [{"method": "lora", "target": {"rol": "x"}}]},
        {"version": 1, "inputs": {"x": "int46[n]"}},
        {"version": 1, "quantize": [{"method": "nf4"}]},
        {"version": 1, "emit": [{"format": "hff", "path": "x"}]},
        {"version": 1, "emit": [{"format": "hf", "path": "x", "max_shard_size": "5 gigs"}]},
        {"version": 1, "emit": [{"format": "hf", "path": "x", "max_shard_size": "0GB"}]},
        {"version": 1, "emit": [{"format": "onnx", "path": "x", "opset": 26}]},
    ]
    assert [spec for spec in bad if validator.is_valid(spec)] == []


@pytest.fixture(scope="module")
def validator() -> Any:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    return jsonschema.Draft202012Validator(schema())


@pytest.mark.parametrize("path", sorted(SPECS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_spec_fits_it(validator: Any, path: Path) -> None:
    validator.validate(Source.read(path).data)
